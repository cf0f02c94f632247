"""Metrics of a split compared with references written pixel by pixel, and with scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from msvae.bands import Bands
from msvae.metrics.aggregate import compute_metrics, summarise
from msvae.metrics.pca import mean_spectrum, project_spectra
from msvae.metrics.tile_sums import LeafPixels, spectral_sums, ssim_sums

BANDS = Bands()


def tiles(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return target and reconstruction (3, 5, 24, 24), and leaf mask (3, 1, 24, 24)."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(3, 5, 24, 24, generator=generator, dtype=torch.float64) * 0.5 + 0.02
    recon = target + 0.05 * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    leaf = torch.rand(3, 1, 24, 24, generator=generator) > 0.4
    leaf[0] = True
    leaf[2] = False
    return target, recon, leaf


def summary_of(target: torch.Tensor, recon: torch.Tensor, leaf: torch.Tensor, span: float = 1.0):
    pixels = LeafPixels.from_tensors(recon, target, leaf)
    sums = {**spectral_sums(pixels, BANDS), **ssim_sums(pixels, [span] * 5)}
    return summarise({name: column.numpy() for name, column in sums.items()})


def test_metrics_equal_references_over_leaf_pixels():
    target, recon, leaf = tiles()
    chosen = leaf[:, 0].numpy()
    u, v = (np.moveaxis(t.numpy(), 1, -1)[chosen] for t in (recon, target))
    summary = summary_of(target, recon, leaf)
    np.testing.assert_allclose(summary.rmse_per_band, np.sqrt(((u - v) ** 2).mean(axis=0)), rtol=1e-12)
    assert summary.psnr_db == pytest.approx(-10 * math.log10(((u - v) ** 2).mean()), rel=1e-12)
    cosine = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    assert summary.angle_deg == pytest.approx(np.degrees(np.arccos(cosine)).mean(), rel=1e-9)
    for index, first, second in (("ndvi", 4, 2), ("ndre", 4, 3)):
        a, b = (
            (np.maximum(s[:, first], 0) - np.maximum(s[:, second], 0))
            / np.maximum(np.maximum(s[:, first], 0) + np.maximum(s[:, second], 0), 1e-3)
            for s in (u, v)
        )
        assert getattr(summary, f"{index}_mae") == pytest.approx(np.abs(a - b).mean(), rel=1e-12)
    assert (summary.num_tiles, summary.num_leaf_pixels) == (3, int(chosen.sum()))


def test_psnr_and_ssim_agree_with_scikit_image_on_full_leaves():
    target, recon, _ = tiles()
    everything = torch.ones(3, 1, 24, 24, dtype=torch.bool)
    summary = summary_of(target, recon, everything)
    assert summary.psnr_db == pytest.approx(
        peak_signal_noise_ratio(target.numpy(), recon.numpy(), data_range=1.0), rel=1e-12
    )
    expected = [
        structural_similarity(target[b].numpy(), recon[b].numpy(), data_range=1.0, channel_axis=0) for b in range(3)
    ]
    assert summary.ssim == pytest.approx(np.mean(expected), rel=1e-9)


def test_metrics_of_a_simple_case_are_exact():
    target = torch.full((1, 5, 8, 8), 0.2, dtype=torch.float64)
    recon = target.clone()
    recon[:, 4] = 0.3
    leaf = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    summary = summary_of(target, recon, leaf)
    assert summary.rmse_per_band == pytest.approx([0, 0, 0, 0, 0.1])
    assert summary.psnr_db == pytest.approx(10 * math.log10(5 / 0.01))
    assert summary.ndvi_mae == pytest.approx(0.1 / 0.5)
    cosine = (4 * 0.2 * 0.2 + 0.2 * 0.3) / math.sqrt(5 * 0.04) / math.sqrt(4 * 0.04 + 0.09)
    assert summary.angle_deg == pytest.approx(math.degrees(math.acos(cosine)))


@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30, 65535.0])
def test_background_changes_no_metric(junk):
    target, recon, leaf = tiles()
    leaf[2, :, :, 10:] = True  # windows inside the leaf share rows with background
    expected = summary_of(target, recon, leaf)
    assert summary_of(torch.where(leaf, target, junk), torch.where(leaf, recon, junk), leaf) == expected


def test_ssim_uses_only_windows_inside_the_leaf():
    target, recon, leaf = tiles()
    leaf[:] = False
    leaf[1, :, :, 10:] = True
    _, ssim = structural_similarity(target[1].numpy(), recon[1].numpy(), data_range=1.0, channel_axis=0, full=True)
    assert summary_of(target, recon, leaf).ssim == pytest.approx(ssim[:, 3:-3, 13:-3].mean(), rel=1e-9)


def test_a_split_without_leaf_is_an_error():
    target, recon, _ = tiles()
    with pytest.raises(ValueError, match="has no leaf pixel"):
        summary_of(target, recon, torch.zeros(3, 1, 24, 24, dtype=torch.bool))


def test_every_tile_has_its_own_error():
    target, recon, leaf = tiles()
    sums = spectral_sums(LeafPixels.from_tensors(recon, target, leaf), BANDS)
    rmse = compute_metrics({name: column.numpy() for name, column in sums.items()})["rmse"]
    error = (recon - target).numpy()[1][:, leaf[1, 0].numpy()]
    assert rmse[1] == pytest.approx(np.sqrt((error**2).mean()))
    assert np.isnan(rmse[2]), "a tile without leaf has no error"


def test_pca_of_spectra_equals_the_svd_and_the_mean_spectrum_is_in_every_pixel():
    target, _, _ = tiles()
    pixels = np.moveaxis(target.numpy(), 1, -1).reshape(-1, 5)
    mean, covariance = pixels.mean(axis=0), np.cov(pixels.T, bias=True)
    u, s, vt = np.linalg.svd(pixels - mean, full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vt[:3] + mean
    recon = project_spectra(target, mean.tolist(), covariance.tolist())
    np.testing.assert_allclose(np.moveaxis(recon.numpy(), 1, -1).reshape(-1, 5), best, atol=1e-10)
    everywhere = mean_spectrum(target, mean.tolist())
    np.testing.assert_allclose(np.moveaxis(everywhere.numpy(), 1, -1).reshape(-1, 5), np.tile(mean, (len(pixels), 1)))


def test_bands_without_near_infrared_have_no_ndvi():
    bands = Bands.of_wavelengths((475.0, 550.0, 660.0))
    target = torch.rand(1, 3, 8, 8)
    leaf = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    pixels = LeafPixels.from_tensors(target, target, leaf)
    sums = {**spectral_sums(pixels, bands), **ssim_sums(pixels, [1.0] * 3)}
    summary = summarise({name: column.numpy() for name, column in sums.items()})
    assert summary.ndvi_mae is None
    assert summary.ssim == pytest.approx(1)
