from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from msvae import AutoencoderKLMultispectralAdapter
from msvae.bands import DEFAULT_WAVELENGTHS_NM, Bands, LeafStatistics
from msvae.model.initialise import pca_projection, rgb_projection

from .conftest import PLACEMENTS, leaf_tiles, load, randomise_new_parts


class TestBackground:
    """Losses, gradients, latents and reconstructed leaf pixels are bit-identical for any background."""

    @pytest.mark.parametrize("junk", ["random", math.nan, math.inf, 1e30])
    @pytest.mark.parametrize("placement", PLACEMENTS)
    @pytest.mark.parametrize("training", [True, False])
    def test_the_background_does_not_change_any_result(self, backbone_folder, statistics, junk, placement, training):
        model = load(backbone_folder, adapter_placement=placement, adapter_init="random", statistics=statistics)
        model.train(training)
        randomise_new_parts(model)
        sample, leaf = leaf_tiles()
        noise = torch.rand_like(sample) * 9 if junk == "random" else torch.full_like(sample, junk)
        results = []
        for seen in (sample, torch.where(leaf, sample, noise)):
            model.zero_grad()
            recon, losses = model(sample=seen, mask=leaf)
            (losses["mse"] + losses["sam"] + losses["kl"]).backward()
            latents = model.encode(seen, mask=leaf).latent_dist.mean
            gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
            results.append((losses["mse"], losses["sam"], losses["kl"], latents, recon, gradients))
        for clean, dirty in zip(*results, strict=True):
            assert clean.isfinite().all()
            assert torch.equal(clean, dirty)

    def test_background_keep_encodes_the_background(self, backbone_folder):
        model = load(backbone_folder, background="keep")
        sample, leaf = leaf_tiles()
        other = torch.where(leaf, sample, 0.9)
        assert not torch.equal(model(sample=sample, mask=leaf)[0], model(sample=other, mask=leaf)[0])
        broken = torch.where(leaf, sample, math.nan)
        assert model(sample=broken, mask=leaf)[1]["mse"].isfinite()


class TestExamplesOfTheSpecification:
    """The code examples of the user's specification work as written."""

    def test_forward_accepts_masks_of_any_type_or_none(self, backbone_folder):
        model = load(backbone_folder, adapter_placement="both", use_spectral_attention=True, use_sam_loss=True)
        sample, leaf = leaf_tiles()
        for mask in (leaf, leaf.float(), leaf.expand_as(sample), None):
            reconstruction, losses = model.forward(sample=sample, mask=mask)
            assert reconstruction.shape == sample.shape
            assert losses["mse_per_channel"].shape == (5,)
            assert losses["mse"].shape == losses["sam"].shape == ()
        stats = losses["mask_stats"]
        assert f"Coverage: {stats['coverage']:.4f}" == "Coverage: 1.0000"
        assert (int(stats["valid_pixels"]), int(stats["total_pixels"])) == (2 * 32 * 32, 2 * 32 * 32)

    def test_losses_equal_a_float64_reference(self, backbone_folder):
        model = load(backbone_folder)
        sample, leaf = leaf_tiles()
        recon, losses = model(sample=sample, mask=leaf)
        chosen = leaf[:, 0].numpy()
        u = np.moveaxis(recon.detach().double().numpy(), 1, -1)[chosen]
        v = np.moveaxis(sample.double().numpy(), 1, -1)[chosen]
        cosine = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
        np.testing.assert_allclose(losses["mse_per_channel"].detach(), ((u - v) ** 2).mean(0), rtol=1e-5)
        assert losses["mse"].item() == pytest.approx(((u - v) ** 2).mean(), rel=1e-5)
        assert losses["sam"].item() == pytest.approx(np.arccos(np.clip(cosine, -1, 1)).mean(), rel=1e-4)
        again = model.compute_losses(sample, recon, mask=leaf)
        assert torch.equal(again["mse"], losses["mse"])

    def test_encode_and_decode_work_as_in_diffusers(self, backbone_folder):
        model = load(backbone_folder)
        sample, _ = leaf_tiles()
        latents = model.encode(sample).latent_dist.sample()
        assert latents.shape == (2, 16, 4, 4)
        assert model.decode(latents).sample.shape == sample.shape

    def test_a_frozen_backbone_leaves_adapters_and_attention_trainable(self, backbone_folder):
        model = load(backbone_folder)
        model.freeze_backbone()
        model(sample=leaf_tiles()[0])[1]["mse"].backward()
        trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {"input_adapter", "output_adapter", "input_attention", "output_attention"}
        assert all(p.grad is None for name, p in model.named_parameters() if name.startswith(("encoder", "decoder")))
        assert len(model.get_trainable_params()) == sum(p.requires_grad for p in model.parameters())

    def test_band_importance_is_keyed_by_wavelength_and_follows_the_data(self, backbone_folder):
        model = load(backbone_folder)
        assert list(model.get_band_importance()) == list(DEFAULT_WAVELENGTHS_NM)
        randomise_new_parts(model)
        sample, leaf = leaf_tiles()
        assert model.get_band_importance(sample, leaf) != model.get_band_importance(sample * 0.1, leaf)
        junk = torch.where(leaf, sample, math.nan)
        assert model.get_band_importance(sample, leaf) == model.get_band_importance(junk, leaf)


@pytest.mark.parametrize("background", ["fill", "keep"])
def test_attention_sees_the_mean_spectrum_of_the_leaf(backbone_folder, statistics, background):
    model = load(backbone_folder, statistics=statistics, adapter_init="pca", background=background)
    randomise_new_parts(model)
    sample, leaf = leaf_tiles(batch=1)
    spectrum = sample[0].double().numpy()[:, leaf[0, 0].numpy()].mean(axis=1)
    standardised = (spectrum - statistics.mean) / statistics.std
    expected = model.input_attention.weights_of_spectrum(torch.tensor(standardised[None], dtype=torch.float32))[0]
    measured = list(model.get_band_importance(sample, leaf).values())
    np.testing.assert_allclose(measured, expected.detach(), rtol=1e-4)
    seen = []
    model.input_attention.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model.encode(sample, mask=leaf)
    bands, weighed = seen[0]
    np.testing.assert_allclose((weighed / bands)[0, :, leaf[0, 0]].mean(dim=1).detach(), measured, rtol=1e-3)


class TestInitialisation:
    def path_without_backbone(self, model: AutoencoderKLMultispectralAdapter, sample: torch.Tensor) -> torch.Tensor:
        standardised = (sample - model.leaf_mean[:, None, None]) / model.leaf_std[:, None, None]
        recon = model.output_adapter(model.input_adapter(standardised))
        return recon * model.leaf_std[:, None, None] + model.leaf_mean[:, None, None]

    def test_pca_adapters_equal_the_linear_reconstruction(self, backbone_folder, statistics):
        model = load(backbone_folder, adapter_init="pca", statistics=statistics)
        sample, _ = leaf_tiles()
        _, vectors = np.linalg.eigh(np.array(statistics.covariance))
        top = vectors[:, -3:]
        centred = np.moveaxis(sample.double().numpy(), 1, -1) - statistics.mean
        expected = centred @ top @ top.T + statistics.mean
        actual = np.moveaxis(self.path_without_backbone(model, sample).detach().numpy(), 1, -1)
        np.testing.assert_allclose(actual, expected, atol=2e-5)

    def test_rgb_adapters_pass_red_green_and_blue_and_regress_the_rest(self, backbone_folder, statistics):
        model = load(backbone_folder, adapter_init="rgb", statistics=statistics)
        sample, _ = leaf_tiles()
        actual = self.path_without_backbone(model, sample).detach().numpy()
        np.testing.assert_allclose(actual[:, :3], sample[:, :3], atol=1e-5)
        covariance, rgb = np.array(statistics.covariance), [2, 1, 0]
        slopes = covariance[3:][:, rgb] @ np.linalg.inv(covariance[np.ix_(rgb, rgb)])
        centred = np.moveaxis(sample.double().numpy(), 1, -1) - statistics.mean
        expected = centred[..., rgb] @ slopes.T + statistics.mean[3:]
        np.testing.assert_allclose(np.moveaxis(actual[:, 3:], 1, -1), expected, atol=1e-4)

    @pytest.mark.parametrize("project", [pca_projection, rgb_projection])
    def test_projections_of_three_bands_invert_each_other(self, statistics, project):
        wavelengths = (475.0, 550.0, 660.0)
        few = LeafStatistics(
            num_pixels=9,
            **{name: getattr(statistics, name)[:3] for name in ("mean", "std", "minimum", "maximum")},
            covariance=[row[:3] for row in statistics.covariance[:3]],
        )
        inwards, outwards = project(Bands.of_wavelengths(wavelengths), few)
        np.testing.assert_allclose(outwards @ inwards, np.eye(3), atol=1e-9)

    @pytest.mark.parametrize("project", [pca_projection, rgb_projection])
    def test_a_projection_with_a_constant_band_is_finite(self, statistics, project):
        covariance = np.array(statistics.covariance)
        covariance[1] = covariance[:, 1] = 0
        constant = statistics.model_copy(
            update={"covariance": covariance.tolist(), "std": np.sqrt(np.diag(covariance)).tolist()}
        )
        assert all(np.isfinite(part).all() for part in project(Bands(), constant))

    def test_a_projection_without_statistics_is_an_error(self, backbone_folder):
        with pytest.raises(ValueError, match="adapter_init `pca` needs the leaf statistics"):
            load(backbone_folder, adapter_init="pca")


def test_wrong_samples_are_errors_that_say_what_is_expected(backbone_folder):
    model = load(backbone_folder)
    with pytest.raises(ValueError, match=r"shape \(1, 4, 32, 32\), the model expects 5 bands"):
        model.encode(torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match=r"sample of torch\.int32, expected reflectance; convert it to float"):
        model.encode(torch.zeros(1, 5, 32, 32, dtype=torch.int32))
    with pytest.raises(ValueError, match="multiples of 8"):
        model.encode(torch.zeros(1, 5, 30, 32))
