"""Every term against a float64 reference written pixel by pixel."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msvae.losses.coverage import check_mask, latent_coverage, mask_stats, valid_elements, valid_spectra
from msvae.losses.objective import objective, term_counts
from msvae.losses.terms import angle_rad, kl_divergence, spectral_angle, squared_error

PIXEL = torch.ones(1, 1, 1, dtype=torch.bool)
masks = st.sampled_from(["empty", "full", "one pixel", "random"])


def random_tiles(seed: int, bands: int, mask: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Reconstruction, target (B, C, H, W) and leaf mask (B, 1, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    recon, target = (torch.rand(2, bands, 8, 16, generator=generator) + 0.05 for _ in range(2))
    leaf = torch.zeros(2, 1, 8, 16, dtype=torch.bool)
    if mask == "full":
        leaf[:] = True
    elif mask == "one pixel":
        leaf[1, 0, 3, 5] = True
    elif mask == "random":
        leaf = torch.rand(2, 1, 8, 16, generator=generator) > 0.6
    return recon, target, leaf


def leaf_spectra(image: torch.Tensor, leaf: torch.Tensor) -> np.ndarray:
    """(pixels, bands) float64: one row a leaf pixel."""
    array, chosen = image.double().numpy(), leaf[:, 0].numpy()
    return np.array([array[b, :, y, x] for b, y, x in zip(*np.nonzero(chosen), strict=True)]).reshape(
        -1, array.shape[1]
    )


@given(st.integers(0, 1000), st.integers(1, 7), masks)
def test_squared_error_equals_the_reference(seed, bands, mask):
    recon, target, leaf = random_tiles(seed, bands, mask)
    result = squared_error(recon, target, valid_elements(target, leaf))
    u, v = leaf_spectra(recon, leaf), leaf_spectra(target, leaf)
    np.testing.assert_allclose(result.total.numpy(), ((u - v) ** 2).sum(axis=0), rtol=1e-5, atol=1e-12)
    assert result.count.tolist() == [len(u)] * bands


@given(st.integers(0, 1000), st.integers(2, 7), masks)
def test_spectral_angle_equals_the_reference(seed, bands, mask):
    recon, target, leaf = random_tiles(seed, bands, mask)
    result = spectral_angle(recon, target, valid_spectra(target, valid_elements(target, leaf)))
    u, v = leaf_spectra(recon, leaf), leaf_spectra(target, leaf)
    cosine = (u * v).sum(axis=1) / (np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1))
    np.testing.assert_allclose(float(result.total), np.arccos(cosine).sum(), rtol=1e-4, atol=1e-6)
    assert int(result.count) == len(u)


def test_the_angle_is_of_a_pixels_bands_not_of_a_bands_pixels():
    """The original code flattened band by band: its "spectra" were pixels of one band."""
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2)  # pixels (1, 0) and (0, 1)
    recon = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).view(1, 2, 1, 2)  # pixels (0, 1) and (1, 0)
    everything = torch.ones(1, 1, 2, dtype=torch.bool)
    right = spectral_angle(recon, target, everything)
    assert float(right.total) == pytest.approx(math.pi)
    scaled = target * torch.tensor([3.0, 0.5]).view(1, 1, 1, 2)  # brightness differs by pixel: no angle at all
    assert float(spectral_angle(scaled, target, everything).total) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("u", "v", "expected"),
    [
        ((0.2, 0.4), (0.2, 0.4), 0.0),
        ((0.2, 0.4), (-0.2, -0.4), math.pi),
        ((0.0, 0.0), (0.2, 0.4), math.pi / 2),
        ((0.0, 0.0), (0.0, 0.0), 0.0),
        ((1.0, 0.0), (1.0, 1e-4), 1e-4),
    ],
)
def test_angles_of_equal_opposite_and_zero_spectra_have_finite_gradients(u, v, expected):
    spectrum = torch.tensor(u).view(1, 2, 1, 1).requires_grad_()
    angle = angle_rad(spectrum, torch.tensor(v).view(1, 2, 1, 1), PIXEL)
    angle.sum().backward()
    assert angle.item() == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert spectrum.grad is not None
    assert spectrum.grad.isfinite().all()


def test_a_broken_reconstruction_is_not_a_perfect_one():
    broken = torch.full((1, 3, 1, 1), math.nan)
    assert angle_rad(broken, torch.ones(1, 3, 1, 1), PIXEL).isnan().all()


def test_gradients_of_angle_and_error_are_right():
    generator = torch.Generator().manual_seed(0)
    recon, target = (torch.rand(2, 3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    recon[0, :, 0, 0] = target[0, :, 0, 0] * 1.7 + 1e-4  # an angle near 0
    recon[0, :, 0, 1] = -target[0, :, 0, 1] * 0.6 + 1e-3  # an angle near pi
    valid = torch.rand(2, 3, 2, 2, generator=generator) > 0.3
    recon.requires_grad_()
    assert torch.autograd.gradcheck(lambda r: angle_rad(r, target, valid[:, 0]), recon, eps=1e-7, atol=1e-4)
    assert torch.autograd.gradcheck(lambda r: squared_error(r, target, valid).total, recon)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_judged_in_single_precision(dtype):
    recon, target, leaf = random_tiles(5, 5, "random")
    valid = valid_elements(target, leaf)
    half = recon.to(dtype).requires_grad_()
    single = half.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for term in (
            lambda r: squared_error(r, target, valid).total.sum(),
            lambda r: spectral_angle(r, target, valid_spectra(target, valid)).total,
        ):
            ours, exact = term(half), term(single)
            assert ours.dtype == torch.float32
            assert ours == exact
            (gradient,), (exact_gradient,) = torch.autograd.grad(ours, half), torch.autograd.grad(exact, single)
            assert gradient.dtype == dtype
            torch.testing.assert_close(gradient, exact_gradient.to(dtype), rtol=0, atol=0)


def test_losses_compile_whole_and_once_for_any_coverage():
    def loss(recon: torch.Tensor, target: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        valid = valid_elements(target, leaf)
        angle = spectral_angle(recon, target, valid_spectra(target, valid))
        return squared_error(recon, target, valid).overall() + angle.overall()

    compiled = torch.compile(loss, fullgraph=True)
    for i, mask in enumerate(("random", "full", "empty", "one pixel")):
        recon, target, leaf = random_tiles(i, 5, mask)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            ours, theirs = (recon.clone().requires_grad_() for _ in range(2))
            compiled(ours, target, leaf).backward()
        loss(theirs, target, leaf).backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


@given(st.integers(0, 1000), masks)
def test_kl_equals_the_reference_weighted_by_leaf_share(seed, mask):
    _, _, leaf = random_tiles(seed, 1, mask)
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = (torch.randn(2, 4, 1, 2, generator=generator) for _ in range(2))
    result = kl_divergence(mean, logvar, latent_coverage(leaf, 8))
    total = count = 0.0
    for b in range(2):
        for cell in range(2):
            share = leaf[b, 0, :, 8 * cell : 8 * cell + 8].double().mean().item()
            m, lv = mean[b, :, 0, cell].double().numpy(), logvar[b, :, 0, cell].double().numpy()
            total += share * 0.5 * float((m**2 + np.exp(lv) - 1 - lv).sum())
            count += share
    assert float(result.total) == pytest.approx(total, rel=1e-5, abs=1e-9)
    assert float(result.count) == pytest.approx(count, rel=1e-6)
    assert float(result.overall()) == pytest.approx(total / count if count else 0, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 1e30])
def test_background_never_reaches_a_loss_or_its_gradient(junk):
    recon, target, leaf = random_tiles(1, 5, "random")
    clean = recon.clone().requires_grad_()
    dirty = torch.where(leaf, recon, junk).requires_grad_()
    dirty_target = torch.where(leaf, target, junk)
    results = []
    for r, t in ((clean, target), (dirty, dirty_target)):
        valid = valid_elements(t, leaf)
        error, angle = squared_error(r, t, valid), spectral_angle(r, t, valid_spectra(t, valid))
        (error.total.sum() + angle.total).backward()
        results.append((error.total, error.count, angle.total, angle.count, r.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_nan_on_the_leaf_of_the_target_is_left_out():
    recon, target, leaf = random_tiles(2, 3, "full")
    target[0, 1, 2, 3] = math.nan
    valid = valid_elements(target, leaf)
    assert squared_error(recon, target, valid).count.tolist() == [256, 255, 256]
    assert int(spectral_angle(recon, target, valid_spectra(target, valid)).count) == 255
    assert squared_error(recon, target, valid).total.isfinite().all()


@given(st.integers(0, 1000), masks, masks)
def test_shares_of_micro_batches_add_up_to_the_loss_of_the_whole(seed, first, second):
    """Not a mean of means: a nearly empty micro batch weighs as little as its leaf."""
    weights = {"mse": 1.0, "sam": 0.5}
    parts = [random_tiles(seed, 5, first), random_tiles(seed + 1, 5, second)]
    whole = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def sums(recon: torch.Tensor, target: torch.Tensor, leaf: torch.Tensor) -> dict:
        valid = valid_elements(target, leaf)
        return {
            "mse": squared_error(recon, target, valid),
            "sam": spectral_angle(recon, target, valid_spectra(target, valid)),
        }

    counts = term_counts(whole[1], whole[2], downscale=8)
    shares = sum(float(objective(sums(*part), counts, weights)) for part in parts)
    own = sums(*whole)
    assert shares == pytest.approx(sum(w * float(own[term].overall()) for term, w in weights.items()), rel=1e-5)
    assert all(torch.equal(own[term].count, counts[term]) for term in weights)


def test_coverage_counts_leaf_pixels():
    leaf = torch.zeros(2, 1, 4, 5, dtype=torch.bool)
    leaf[0, 0, :2] = True
    stats = mask_stats(leaf)
    assert (int(stats["valid_pixels"]), int(stats["total_pixels"]), float(stats["coverage"])) == (10, 40, 0.25)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float16])
def test_masks_of_any_type_are_leaf_above_one_half(dtype):
    sample = torch.zeros(1, 3, 2, 2)
    mask = torch.tensor([[[[0, 1], [1, 0]]]]).to(dtype)
    assert check_mask(mask, sample).tolist() == [[[[False, True], [True, False]]]]
    assert check_mask(None, sample).all()
    if dtype.is_floating_point:
        assert check_mask(mask * 0.5, sample).sum() == 0


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 2, 2), r"shape \(1, 2, 2\) .* expected \(1, 1, 2, 2\)"),
        (torch.ones(1, 2, 2, 2), r"shape \(1, 2, 2, 2\) .* expected \(1, 1, 2, 2\) or one plane a band"),
        (torch.ones(1, 1, 3, 2), r"shape \(1, 1, 3, 2\)"),
        (torch.ones(1, 1, 2, 2, device="meta"), "on meta and a sample on cpu"),
        (torch.full((1, 1, 2, 2), math.nan), "mask with NaN"),
    ],
)
def test_a_wrong_mask_is_an_error_that_says_what_was_expected(mask, message):
    with pytest.raises(ValueError, match=message):
        check_mask(mask, torch.zeros(1, 3, 2, 2))
