"""Every metric of a report, for cases whose result can be computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from msvae.bands import Bands
from msvae.metrics.aggregate import compute_metrics, latent_statistics, mean_spectrum_sums
from msvae.metrics.detail import EDGE_PX, SID_FLOOR, detail_sums, information_divergence, is_edge
from msvae.metrics.histograms import (
    ANGLE_EDGES_DEG,
    ERROR_EDGES,
    BrightnessDeciles,
    angle_counts,
    brightness_counts,
    error_counts,
    quantile,
)
from msvae.metrics.tile_sums import LeafPixels, latent_sums, spectral_sums, ssim_sums

BANDS = Bands()
BLUE, GREEN, RED, RED_EDGE, NIR = range(5)
LEAF_SPECTRUM = (0.05, 0.10, 0.05, 0.25, 0.45)


def flat(num_tiles: int = 1, side: int = 8) -> torch.Tensor:
    """Return tiles with the same leaf spectrum in every pixel."""
    return torch.tensor(LEAF_SPECTRUM, dtype=torch.float64)[None, :, None, None].repeat(num_tiles, 1, side, side)


def everywhere(tiles: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(tiles[:, :1], dtype=torch.bool)


def sums_of(recon: torch.Tensor, target: torch.Tensor, leaf: torch.Tensor) -> dict[str, np.ndarray]:
    pixels = LeafPixels.from_tensors(recon, target, leaf)
    deciles = BrightnessDeciles(brightness_counts(pixels.brightness, pixels.leaf).numpy())
    sums = {
        **spectral_sums(pixels, BANDS),
        **ssim_sums(pixels, [1.0] * 5),
        **detail_sums(pixels, leaf, BANDS, deciles),
        "angle_counts": angle_counts(pixels),
    }
    return {name: column.numpy() for name, column in sums.items()}


def numbers_of(recon: torch.Tensor, target: torch.Tensor, leaf: torch.Tensor) -> dict[str, np.ndarray]:
    """Return the metrics of all tiles together."""
    return compute_metrics(
        {name: column.sum(axis=0, keepdims=True) for name, column in sums_of(recon, target, leaf).items()}
    )


def test_metrics_of_an_error_in_one_band_are_exact():
    target = flat()
    recon = target.clone()
    recon[:, GREEN, :4] += 0.02
    recon[:, GREEN, 4:] -= 0.06
    numbers = numbers_of(recon, target, everywhere(target))
    assert numbers["mae_per_band"][0] == pytest.approx([0, 0.04, 0, 0, 0], abs=1e-15)
    assert numbers["mae"][0] == pytest.approx(0.04 / 5)
    assert numbers["bias_per_band"][0] == pytest.approx([0, -0.02, 0, 0, 0], abs=1e-15)
    mse = (0.02**2 + 0.06**2) / 2
    assert numbers["rmse_per_band"][0, GREEN] == pytest.approx(math.sqrt(mse))
    assert numbers["psnr_db_per_band"][0, GREEN] == pytest.approx(-10 * math.log10(mse))
    assert numbers["psnr_db_per_band"][0, BLUE] == pytest.approx(200), "an exact band"
    assert numbers["rmse"][0] == pytest.approx(math.sqrt(mse / 5))


def test_errors_and_biases_of_vegetation_indices_are_exact():
    target = flat()
    recon = target.clone()
    recon[:, NIR, :, :2] = 0.50  # a quarter of the leaf
    recon[:, RED_EDGE, :, 2:4] = 0.20  # another
    numbers = numbers_of(recon, target, everywhere(target))
    gndvi = (0.50 - 0.10) / 0.60 - 0.35 / 0.55
    assert numbers["gndvi_mae"][0] == pytest.approx(gndvi / 4)
    assert numbers["gndvi_bias"][0] == pytest.approx(gndvi / 4)
    cire = (0.50 / 0.25 - 0.45 / 0.25, 0.45 / 0.20 - 0.45 / 0.25)
    assert numbers["cire_mae"][0] == pytest.approx(sum(cire) / 4)
    ndre = ((0.50 - 0.25) / 0.75 - 0.20 / 0.70, 0.25 / 0.65 - 0.20 / 0.70)
    assert numbers["ndre_mae"][0] == pytest.approx(sum(ndre) / 4)
    assert numbers["ndre_bias"][0] == pytest.approx(sum(ndre) / 4)


def test_errors_of_both_signs_cancel_only_in_the_bias():
    target = flat()
    recon = target.clone()
    recon[:, RED, :4] += 0.01
    recon[:, RED, 4:] -= 0.01
    numbers = numbers_of(recon, target, everywhere(target))
    above, below = (0.45 - 0.06) / 0.51 - 0.8, (0.45 - 0.04) / 0.49 - 0.8
    assert numbers["ndvi_mae"][0] == pytest.approx((abs(above) + abs(below)) / 2)
    assert numbers["ndvi_bias"][0] == pytest.approx((above + below) / 2)
    assert numbers["bias_per_band"][0, RED] == pytest.approx(0, abs=1e-15)


def test_cire_stays_finite_for_a_red_edge_reflectance_below_zero():
    target = flat()
    recon = target.clone()
    recon[:, RED_EDGE] = -0.3
    assert numbers_of(recon, target, everywhere(target))["cire_mae"][0] == pytest.approx(0.45 / 0.01 - 0.45 / 0.25)


def test_information_divergence_of_two_bands_equals_the_result_by_hand():
    u, v = torch.tensor([0.2, 0.2]), torch.tensor([0.1, 0.3])  # p = (1/2, 1/2), q = (1/4, 3/4)
    divergence = information_divergence(u.double()[None, :, None, None], v.double()[None, :, None, None])
    assert divergence.item() == pytest.approx(0.25 * math.log(3), rel=1e-7)


def test_information_divergence_depends_on_shape_only_and_replaces_negative_values_by_the_floor():
    spectrum = flat()
    assert information_divergence(3 * spectrum, spectrum).abs().max() < 1e-12
    below, floor = spectrum.clone(), spectrum.clone()
    below[:, RED], floor[:, RED] = -0.2, SID_FLOOR
    assert torch.equal(information_divergence(below, spectrum), information_divergence(floor, spectrum))
    assert information_divergence(below, spectrum).isfinite().all()


def test_leaf_edge_is_next_to_background_and_the_border_of_a_tile_is_no_leaf_edge():
    leaf = torch.zeros(1, 1, 24, 24, dtype=torch.bool)
    leaf[..., 10:] = True
    edge = is_edge(leaf)[0]
    assert edge[:, 10 : 10 + EDGE_PX].all()
    assert edge.sum() == 24 * EDGE_PX
    assert not is_edge(torch.ones_like(leaf)).any()


def test_edge_and_interior_have_separate_errors():
    target = flat(side=24)
    leaf = everywhere(target)
    leaf[..., :10] = False
    recon = target.clone()
    recon[..., 10 : 10 + EDGE_PX] *= 1.5  # same angle, other brightness
    recon[:, NIR, :, 20:] += 0.1
    numbers = numbers_of(recon, target, leaf)
    half = 0.5 * np.array(LEAF_SPECTRUM)
    assert numbers["rmse_per_zone"][0] == pytest.approx([math.sqrt((half**2).mean()), math.sqrt(0.01 / 5 * 4 / 10)])
    u = np.array(LEAF_SPECTRUM)
    v = u + 0.1 * np.eye(5)[NIR]
    angle = math.degrees(math.acos(u @ v / np.linalg.norm(u) / np.linalg.norm(v)))
    assert numbers["angle_deg_per_zone"][0] == pytest.approx([0, angle * 4 / 10], abs=1e-6)


def test_deciles_of_brightness_hold_a_tenth_of_the_leaf_each():
    target = flat(side=10) * torch.linspace(1, 2, 100, dtype=torch.float64).reshape(10, 10)
    recon = target.clone()
    recon[:, :, 3] += 0.03  # the fourth tenth
    sums = sums_of(recon, target, everywhere(target))
    assert sums["decile_pixels"].tolist() == [[10] * 10]
    rmse = compute_metrics(sums)["rmse_per_decile"][0]
    assert rmse == pytest.approx([0, 0, 0, 0.03, 0, 0, 0, 0, 0, 0], abs=1e-12)


def test_pixels_of_equal_brightness_are_in_one_decile():
    target = flat()
    assert sums_of(target, target, everywhere(target))["decile_pixels"].tolist() == [[0] * 5 + [64] + [0] * 4]


def test_decile_edges_equal_the_quantiles_of_brightness():
    brightness = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.5
    leaf = torch.ones_like(brightness, dtype=torch.bool)
    edges = BrightnessDeciles(brightness_counts(brightness, leaf).numpy()).edges
    np.testing.assert_allclose(edges, np.quantile(brightness.numpy(), np.arange(0.1, 1, 0.1)), atol=2e-4)


def test_percentiles_of_the_angle_are_within_one_percent():
    generator = np.random.default_rng(2)
    angles = np.concatenate([generator.gamma(2, 3, 4000), generator.uniform(0.01, 0.02, 500)])
    counts = np.histogram(angles, ANGLE_EDGES_DEG)[0].astype(float)
    for share in (0.05, 0.5, 0.95):
        assert quantile(counts, ANGLE_EDGES_DEG, share) == pytest.approx(np.quantile(angles, share), rel=0.01)


def test_median_and_95th_percentile_of_the_angle_are_within_one_percent():
    target = flat(side=10)
    turned = torch.tensor(np.deg2rad(np.arange(1, 101) * 0.3), dtype=torch.float64).reshape(10, 10)
    direction = torch.tensor(LEAF_SPECTRUM, dtype=torch.float64)
    across = torch.tensor([-LEAF_SPECTRUM[1], LEAF_SPECTRUM[0], 0, 0, 0], dtype=torch.float64)
    across *= direction.norm() / across.norm()
    recon = direction[:, None, None] * turned.cos() + across[:, None, None] * turned.sin()
    numbers = numbers_of(recon[None], target, everywhere(target))
    assert numbers["angle_deg"][0] == pytest.approx(0.3 * 50.5)
    assert numbers["angle_median_deg"][0] == pytest.approx(15.0, rel=0.01)
    assert numbers["angle_p95_deg"][0] == pytest.approx(28.5, rel=0.01)


def test_errors_are_counted_in_their_bins_and_large_errors_in_the_outermost():
    target = flat(side=4)
    recon = target.clone()
    recon[:, RED] += 0.0105
    recon[:, NIR] -= 5.0
    counts = error_counts(LeafPixels.from_tensors(recon, target, everywhere(target)))
    assert counts.sum(dim=1).tolist() == [16] * 5
    middle = int(np.searchsorted(ERROR_EDGES, 0.0105)) - 1
    assert counts[RED, middle] == 16
    assert counts[NIR, 0] == 16


def test_mean_spectra_of_images_are_compared():
    target = flat(num_tiles=2)
    recon = target + torch.tensor([0.1, -0.1], dtype=torch.float64)[:, None, None, None]
    leaf = everywhere(target)
    leaf[1, :, :, 4:] = False
    sums = sums_of(recon, target, leaf)
    joined = {name: column.sum(axis=0, keepdims=True) for name, column in {**sums, **mean_spectrum_sums(sums)}.items()}
    numbers = compute_metrics(joined)
    assert numbers["mean_spectrum_rmse"][0] == pytest.approx(0.1)
    assert numbers["bias_per_band"][0] == pytest.approx([0.1 / 3] * 5)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -1e30])
def test_background_changes_no_sum(junk):
    generator = torch.Generator().manual_seed(1)
    target = torch.rand(2, 5, 24, 24, generator=generator, dtype=torch.float64) * 0.5
    recon = target + 0.05 * torch.randn(target.shape, generator=generator, dtype=torch.float64)
    leaf = torch.rand(2, 1, 24, 24, generator=generator) > 0.3
    leaf[1] = False
    expected = sums_of(recon, target, leaf)
    found = sums_of(torch.where(leaf, recon, junk), torch.where(leaf, target, junk), leaf)
    for name, column in expected.items():
        np.testing.assert_array_equal(found[name], column, err_msg=name)
    assert np.isnan(compute_metrics(found)["psnr_db"][1]), "a tile without leaf"


def test_latents_are_weighted_by_the_leaf_share_of_their_cell():
    mean = torch.tensor([[[[1.0, 3.0], [100.0, math.nan]]]], dtype=torch.float64)
    logvar = torch.zeros_like(mean)
    share = torch.tensor([[[1.0, 0.5], [0.0, 0.0]]])
    sums = {name: column.numpy() for name, column in latent_sums(mean, logvar, share).items()}
    numbers = latent_statistics(sums)
    middle = (1 + 0.5 * 3) / 1.5
    assert numbers["leaf_cells"] == 1.5
    assert numbers["mean_per_channel"] == pytest.approx([middle])
    assert numbers["std_per_channel"] == pytest.approx([math.sqrt((1 + 0.5 * 9) / 1.5 - middle**2)])
    assert numbers["posterior_std_per_channel"] == pytest.approx([1.0])
    assert numbers["kl_per_channel_nats"] == pytest.approx([0.5 * (1 + 0.5 * 9) / 1.5])
    assert numbers["active_channels"] == 1
