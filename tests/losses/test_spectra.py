"""Squared error and spectral angle against float64 references written pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msvae.losses import spectra
from msvae.losses.spectra import count_elements_and_spectra, count_nonfinite, error_and_angle, squared_error

from .tiles import band_values, dtypes, leaf_spectra, masks, random_tiles, sides, tolerance

PIXEL = torch.ones(1, 1, 1, 1, dtype=torch.bool)


@given(st.integers(0, 1000), st.integers(1, 7), masks, sides, dtypes)
def test_error_and_angle_equal_the_reference(seed, bands, mask, side, dtype):
    recon, target, leaf = random_tiles(seed, bands, mask, side, dtype)
    error, angle = error_and_angle(recon, target, leaf)
    for band in range(bands):
        u, v = (band_values(image, leaf, band) for image in (recon, target))
        assert float(error.total[band]) == pytest.approx(((u - v) ** 2).sum(), rel=tolerance(dtype))
        assert int(error.count[band]) == len(u)
    u, v = (leaf_spectra(image, leaf) for image in (recon, target))
    unit_u, unit_v = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in (u, v))
    expected = 2 * np.arctan2(np.linalg.norm(unit_u - unit_v, axis=1), np.linalg.norm(unit_u + unit_v, axis=1))
    rounding = len(u) * (1e-15 if dtype == torch.float64 else 1.2e-7)
    assert float(angle.total) == pytest.approx(expected.sum(), rel=tolerance(dtype), abs=rounding)
    assert int(angle.count) == len(u)
    alone = squared_error(recon, target, leaf)
    assert torch.equal(alone.total, error.total)
    assert torch.equal(alone.count, error.count)
    elements, with_angle = count_elements_and_spectra(target, leaf)
    assert torch.equal(elements, error.count)
    assert torch.equal(with_angle, angle.count)


@pytest.mark.parametrize("block_pixels", [16, 50, 128, 300])
def test_the_block_size_does_not_change_the_result(monkeypatch, block_pixels):
    recon, target, leaf = random_tiles(4, 5, "random", (16, 24))
    results = []
    for pixels in (2**16, block_pixels):
        monkeypatch.setattr(spectra, "BLOCK_PIXELS", pixels)
        ours = recon.clone().requires_grad_()
        error, angle = error_and_angle(ours, target, leaf)
        (error.total.sum() + angle.total).backward()
        results.append((error.total.detach(), error.count, angle.total.detach(), angle.count, ours.grad))
    for whole, cut in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-7)


def test_the_code_path_of_gpus_and_compilers_has_the_same_result(monkeypatch):
    recon, target, leaf = random_tiles(4, 5, "one band", (16, 24))
    target[0, 2, 3, 4] = math.nan
    results = []
    for in_blocks in (True, False):
        monkeypatch.setattr(spectra, "_in_blocks", lambda _, chosen=in_blocks: chosen)
        ours = recon.clone().requires_grad_()
        error, angle = error_and_angle(ours, target, leaf)
        (error.total.sum() + angle.total).backward()
        results.append((error.total.detach(), error.count, angle.total.detach(), angle.count, ours.grad))
    for blocks, whole in zip(*results, strict=True):
        torch.testing.assert_close(whole, blocks, rtol=1e-5, atol=1e-7)


def test_the_angle_is_computed_over_the_bands_of_a_pixel():
    """The code of the specification flattens band by band, so its "spectra" are pixels of one band."""
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)  # pixels (1, 0) and (0, 1)
    recon = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(1, 2, 1, 2)  # pixels (0, 1) and (1, 0)
    everything = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    assert float(error_and_angle(recon, target, everything)[1].total) == pytest.approx(math.pi)
    scaled = target * torch.tensor([3.0, 0.5]).view(
        1, 1, 1, 2
    )  # only the brightness of each pixel differs, so the angle is 0
    assert float(error_and_angle(scaled, target, everything)[1].total) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("u", "v", "expected"),
    [
        ((0.25, 0.5), (0.25, 0.5), 0.0),
        ((0.5, 1.0), (0.25, 0.5), 0.0),
        ((-0.25, -0.5), (0.25, 0.5), math.pi),
        ((0.0, 0.0), (0.25, 0.5), math.pi / 2),
        ((0.5, -0.25), (0.25, 0.5), math.pi / 2),
        ((0.0, 0.0), (0.0, 0.0), 0.0),
        ((1e-6, 2e-6), (0.25, 0.5), 0.0),
    ],
)
def test_equal_opposite_and_zero_spectra_have_finite_angles_and_gradients(u, v, expected, dtype):
    spectrum = torch.tensor(u).view(1, 2, 1, 1).to(dtype).requires_grad_()
    error, angle = error_and_angle(spectrum, torch.tensor(v).view(1, 2, 1, 1).to(dtype), PIXEL)
    (error.total.sum() + angle.total).backward()
    angle_rad = angle.total.item()
    if min(map(abs, u)) in (0, 0.25, 0.5):  # other values are not exact in half precision
        assert angle_rad == pytest.approx(expected, abs=1e-6)
    assert math.isfinite(angle_rad)
    assert spectrum.grad is not None
    assert spectrum.grad.isfinite().all()


def test_small_angles_are_exact():
    u = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)
    for angle in (1e-3, 1e-5, 1e-6):
        v = torch.tensor([math.cos(angle), math.sin(angle)]).view(1, 2, 1, 1)
        assert float(error_and_angle(u, v, PIXEL)[1].total) == pytest.approx(angle, rel=1e-5)


@pytest.mark.parametrize("bands", [1, 2, 5, 60])
@pytest.mark.parametrize("factor", [0.7, 1.0, 3.0, -0.3])
def test_the_angle_has_a_gradient_near_parallel_spectra_but_not_at_them(bands, factor):
    """The rounding error between parallel spectra has no direction. With one band, the angle is always 0 or pi."""
    generator = torch.Generator().manual_seed(bands)
    target = torch.rand(1, bands, 16, 16, generator=generator) + 0.05
    recon = (target * factor).requires_grad_()
    everything = torch.ones(1, 1, 16, 16, dtype=torch.bool)
    (gradient,) = torch.autograd.grad(error_and_angle(recon, target, everything)[1].total, recon)
    assert (gradient == 0).all()
    if bands > 1:
        other = (
            torch.rand(target.shape, generator=generator) * torch.tensor([1.0, -1.0]).repeat(bands)[:bands, None, None]
        )
        near = (target * factor + 1e-4 * other).requires_grad_()
        (gradient,) = torch.autograd.grad(error_and_angle(near, target, everything)[1].total, near)
        assert (gradient.norm(dim=1) > 0).all()


def test_a_nan_reconstruction_has_a_nan_loss_and_gradient():
    broken = torch.full((1, 3, 1, 1), math.nan, requires_grad=True)
    error, angle = error_and_angle(broken, torch.ones(1, 3, 1, 1), PIXEL)
    assert error.total.isnan().all()
    assert angle.total.isnan()
    (gradient,) = torch.autograd.grad(angle.total, broken)
    assert gradient.isnan().all()


@pytest.mark.parametrize("mask", ["random", "one band"])
def test_gradients_of_angle_and_error_equal_finite_differences(mask):
    recon, target, valid = random_tiles(0, 3, mask, (8, 8), torch.float64)
    recon[0, :, 0, 0] = target[0, :, 0, 0] * 1.7 + 1e-4  # an angle near 0
    recon[0, :, 0, 1] = -target[0, :, 0, 1] * 0.6 + 1e-3  # an angle near pi
    valid[0, :, 0, :2] = True
    weights = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)

    def loss(recon: torch.Tensor) -> torch.Tensor:
        error, angle = error_and_angle(recon, target, valid)
        return (error.total * weights).sum() + 0.7 * angle.total

    assert torch.autograd.gradcheck(loss, recon.requires_grad_(), eps=1e-7, atol=1e-4)
    assert torch.autograd.gradcheck(lambda r: squared_error(r, target, valid).total, recon)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_computed_in_float32_under_autocast(dtype):
    recon, target, leaf = random_tiles(5, 5, "random")
    half = recon.to(dtype).requires_grad_()
    single = half.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for term in (0, 1):
            ours, exact = (error_and_angle(r, target, leaf)[term].total.sum() for r in (half, single))
            assert ours.dtype == torch.float32
            assert ours == exact
            (gradient,), (exact_gradient,) = torch.autograd.grad(ours, half), torch.autograd.grad(exact, single)
            assert gradient.dtype == dtype
            torch.testing.assert_close(gradient, exact_gradient.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("in_blocks", [True, False])
def test_background_never_reaches_a_loss_or_its_gradient(junk, in_blocks, monkeypatch):
    monkeypatch.setattr(spectra, "_in_blocks", lambda _: in_blocks)
    recon, target, leaf = random_tiles(1, 5, "random")
    results = []
    for r, t in ((recon.clone(), target), (torch.where(leaf, recon, junk), torch.where(leaf, target, junk))):
        error, angle = error_and_angle(r.requires_grad_(), t, leaf)
        (error.total.sum() + angle.total).backward()
        results.append((error.total, error.count, angle.total, angle.count, r.grad))
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_non_finite_leaf_values_of_the_target_are_ignored_and_counted(junk):
    recon, target, leaf = random_tiles(2, 3, "full")
    target[0, 1, 2, 3] = junk
    error, angle = error_and_angle(recon.requires_grad_(), target, leaf)
    assert error.count.tolist() == [256, 255, 256]
    assert int(angle.count) == 255
    assert error.total.isfinite().all()
    (error.total.sum() + angle.total).backward()
    assert recon.grad[0, :, 2, 3].tolist()[1] == 0
    assert recon.grad.isfinite().all()
    nonfinite, leaf_elements = count_nonfinite(target, leaf)
    assert (int(nonfinite), int(leaf_elements)) == (1, 3 * 256)


def test_a_band_may_be_missing_at_some_pixels():
    recon, target, leaf = random_tiles(3, 4, "one band")
    target = torch.where(leaf, target, math.nan)
    error, angle = error_and_angle(recon.requires_grad_(), target, leaf)
    (error.total.sum() + angle.total).backward()
    num_missing = int((~leaf).sum())
    assert error.count.tolist() == [256 - num_missing, 256, 256, 256]
    assert int(angle.count) == 256 - num_missing
    assert recon.grad.isfinite().all()
    assert (recon.grad[~leaf] == 0).all()
    assert (recon.grad[leaf] != 0).all()
    assert int(count_nonfinite(target, leaf)[0]) == 0
