"""Features of AutoencoderKL in the model: slicing, tiling, gradient checkpointing, latents, offloading."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from msvae import AutoencoderKLMultispectralAdapter
from msvae.model.build import TINY_BACKBONE

from .conftest import PLACEMENTS, leaf_statistics, leaf_tiles, load, randomise_new_parts

FOUR_LATENT_CHANNELS = {
    "latent_channels": 4,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "scaling_factor": 0.18215,
    "shift_factor": None,
}
SIXTEEN_LATENT_CHANNELS = {"scaling_factor": 1.5305, "shift_factor": 0.0609}


def backbone_of(model: AutoencoderKLMultispectralAdapter) -> AutoencoderKL:
    """Return the backbone of a model as an AutoencoderKL."""
    names = inspect.signature(AutoencoderKL.__init__).parameters
    backbone = AutoencoderKL(**{name: value for name, value in model.config.items() if name in names})
    backbone.load_state_dict(
        {name: value for name, value in model.state_dict().items() if name in backbone.state_dict()}
    )
    return backbone.eval()


def enable(model: AutoencoderKL, setting: str) -> None:
    if setting == "slicing":
        model.enable_slicing()
    elif setting == "tiling":
        model.enable_tiling()
        assert (model.tile_sample_min_size, model.tile_latent_min_size) == (32, 4)


def large_image() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.rand(2, 5, 64, 88, generator=generator), torch.rand(2, 1, 64, 88, generator=generator) > 0.5


@pytest.mark.parametrize("latents", [FOUR_LATENT_CHANNELS, SIXTEEN_LATENT_CHANNELS])
@pytest.mark.parametrize("setting", ["whole", "slicing", "tiling"])
def test_the_backbone_between_the_adapters_equals_autoencoder_kl(tmp_path, statistics, setting, latents):
    AutoencoderKL(**{**TINY_BACKBONE, **latents}).save_pretrained(tmp_path)
    model = load(tmp_path, statistics=statistics)
    randomise_new_parts(model)
    backbone = backbone_of(model)
    between = []
    model.input_adapter.register_forward_hook(lambda _, inputs, output: between.append(output))
    model.output_adapter.register_forward_pre_hook(lambda _, inputs: between.append(inputs[0]))
    enable(model, setting)
    enable(backbone, setting)
    sample, leaf = large_image()
    with torch.no_grad():
        posterior = model.encode(sample, mask=leaf).latent_dist
        decoded = model.decode(posterior.mode()).sample
        encoder_input, decoder_output = between
        assert torch.equal(posterior.parameters, backbone.encode(encoder_input).latent_dist.parameters)
        assert torch.equal(decoder_output, backbone.decode(posterior.mode()).sample)
    assert posterior.mean.shape == (2, model.config.latent_channels, 8, 11)
    assert decoded.shape == sample.shape
    assert decoded.isfinite().all()


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tiled_encoding_hides_the_background(backbone_folder, placement):
    model = load(backbone_folder, adapter_placement=placement)
    sample, leaf = large_image()
    whole = model.encode(sample, mask=leaf).latent_dist.mean
    model.enable_tiling()
    tiled = [model.encode(seen, mask=leaf).latent_dist.mean for seen in (sample, torch.where(leaf, sample, torch.nan))]
    assert torch.equal(*tiled)
    assert not torch.allclose(whole, tiled[0]), "tiling had no effect, so nothing was tested"
    assert model.decode(tiled[0]).sample.shape == sample.shape


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_does_not_change_gradients(backbone_folder, frozen):
    model = load(backbone_folder).train()
    randomise_new_parts(model)
    if frozen:
        model.freeze_backbone()
    sample, leaf = leaf_tiles()
    calls, gradients = [], []
    model.decoder.up_blocks[0].resnets[0].conv1.register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(sample=sample, mask=leaf)[1]["mse"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.get_trainable_params() if p.grad is not None]))
    assert len(calls) == 3, "the decoder was not computed again, so nothing was tested"
    assert torch.equal(*gradients)


@pytest.mark.parametrize("latents", [FOUR_LATENT_CHANNELS, SIXTEEN_LATENT_CHANNELS])
def test_scaling_and_shift_factors_of_the_backbone_are_kept(tmp_path, latents):
    AutoencoderKL(**{**TINY_BACKBONE, **latents}).save_pretrained(tmp_path / "backbone")
    model = load(tmp_path / "backbone")
    model.save_pretrained(tmp_path / "saved")
    for config in (model.config, load(tmp_path / "saved").config):
        assert {name: config[name] for name in latents} == latents


@pytest.mark.parametrize("num_bands", [1, 2, 5, 12, 300])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_any_number_of_bands_works(backbone_folder, tmp_path, num_bands, placement):
    wavelengths = tuple(float(nm) for nm in np.linspace(400, 1000, num_bands))
    model = load(backbone_folder, wavelengths_nm=wavelengths, adapter_placement=placement)
    sample = torch.rand(1, num_bands, 16, 16)
    recon, losses = model(sample=sample)
    assert recon.shape == sample.shape
    losses["mse"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path)(sample=sample)[0], recon)


@pytest.mark.parametrize("how", ["rgb", "pca"])
def test_projections_of_300_bands_are_finite_and_close_to_the_input(backbone_folder, how):
    wavelengths = tuple(float(nm) for nm in np.linspace(400, 1000, 300))
    statistics = leaf_statistics([0.3] * 300)
    model = load(backbone_folder, wavelengths_nm=wavelengths, adapter_init=how, statistics=statistics)
    factors = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).double().numpy()
    noise = np.linalg.cholesky(np.array(statistics.covariance)) @ factors.T
    standardised = torch.tensor(noise / np.array(statistics.std)[:, None], dtype=torch.float32)[None, :, :, None]
    passed = model.output_adapter(model.input_adapter(standardised))
    assert passed.isfinite().all()
    # five directions vary, and the adapter passes three of them
    assert (passed - standardised).square().mean() < 0.5 * standardised.square().mean()


def test_an_offloaded_model_returns_to_its_device_before_it_computes(backbone_folder, statistics):
    model = load(backbone_folder, statistics=statistics)
    sample, _ = leaf_tiles()
    latents = model.encode(sample).latent_dist.mode()
    expected = model.decode(latents).sample
    model._hf_hook = SimpleNamespace(pre_forward=lambda offloaded: offloaded.to("cpu"))
    model.leaf_mean.fill_(torch.nan)
    assert torch.equal(model.encode(sample).latent_dist.mode(), latents)
    model.leaf_mean.fill_(torch.nan)
    assert torch.equal(model.decode(latents).sample, expected)
