"""Metrics of whole tiles compared with torchmetrics and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchmetrics.functional as functional
from skimage.metrics import mean_squared_error, peak_signal_noise_ratio, structural_similarity

from msvae.bands import Bands
from msvae.metrics.aggregate import compute_metrics
from msvae.metrics.detail import detail_sums
from msvae.metrics.histograms import BrightnessDeciles, brightness_counts
from msvae.metrics.tile_sums import LeafPixels, spectral_sums, ssim_sums

SPAN = (0.4, 0.5, 0.6, 0.7, 0.8)


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    target = torch.rand(4, 5, 32, 32, generator=generator, dtype=torch.float64) * 0.5 + 0.02
    return target, target + 0.05 * torch.randn(target.shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def numbers(pair) -> dict[str, np.ndarray]:
    target, recon = pair
    leaf = torch.ones_like(target[:, :1], dtype=torch.bool)
    pixels = LeafPixels.from_tensors(recon, target, leaf)
    deciles = BrightnessDeciles(brightness_counts(pixels.brightness, pixels.leaf).numpy())
    sums = {
        **spectral_sums(pixels, Bands()),
        **ssim_sums(pixels, SPAN),
        **detail_sums(pixels, leaf, Bands(), deciles),
    }
    return compute_metrics({name: column.numpy().sum(axis=0, keepdims=True) for name, column in sums.items()})


def test_metrics_equal_those_of_torchmetrics(pair, numbers):
    target, recon = pair
    psnr = functional.image.peak_signal_noise_ratio(recon, target, data_range=1.0)
    assert numbers["psnr_db"][0] == pytest.approx(psnr.item(), rel=1e-6)  # torchmetrics keeps the peak in float32
    angle = functional.image.spectral_angle_mapper(recon, target)
    assert numbers["angle_deg"][0] == pytest.approx(np.degrees(angle.item()), rel=1e-9)
    for band in range(5):
        u, v = recon[:, band].flatten(), target[:, band].flatten()
        assert numbers["mae_per_band"][0, band] == pytest.approx(
            functional.mean_absolute_error(u, v).item(), rel=1e-12
        )
        rmse = functional.mean_squared_error(u, v, squared=False)
        assert numbers["rmse_per_band"][0, band] == pytest.approx(rmse.item(), rel=1e-12)


def test_metrics_equal_those_of_scikit_image(pair, numbers):
    target, recon = (tiles.numpy() for tiles in pair)
    for band, span in enumerate(SPAN):
        u, v = target[:, band], recon[:, band]
        assert numbers["rmse_per_band"][0, band] == pytest.approx(np.sqrt(mean_squared_error(u, v)), rel=1e-12)
        psnr = peak_signal_noise_ratio(u, v, data_range=1.0)
        assert numbers["psnr_db_per_band"][0, band] == pytest.approx(psnr, rel=1e-12)
        ssim = np.mean([structural_similarity(*tiles, data_range=span) for tiles in zip(u, v, strict=True)])
        assert numbers["ssim_per_band"][0, band] == pytest.approx(ssim, rel=1e-9)
    assert numbers["ssim"][0] == pytest.approx(numbers["ssim_per_band"][0].mean())
