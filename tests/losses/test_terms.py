"""Every other term against a float64 reference that does not use the code under test."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msvae.losses import terms
from msvae.losses.coverage import latent_coverage, valid_elements
from msvae.losses.spectra import has_spectrum

from .tiles import band_values, dtypes, leaf_spectra, masks, random_tiles, tolerance

UNIT = torch.tensor([0.02, 0.1, 1.0, 0.5, 3.0])
PAIRS = [(4, 2), (4, 3), (1, 0)]


def per_band(recon: torch.Tensor, target: torch.Tensor, leaf: torch.Tensor):
    """Yield (band, reconstructed values, target values, unit) in float64."""
    for band, unit in enumerate(UNIT.double().tolist()):
        yield band, band_values(recon, leaf, band), band_values(target, leaf, band), unit


@given(st.integers(0, 1000), masks, dtypes)
def test_errors_per_band_equal_the_reference(seed, mask, dtype):
    recon, target, leaf = random_tiles(seed, 5, mask, dtype=dtype)
    recon = recon * 2 - 0.6  # some values are below 0 or above 1
    valid = valid_elements(target, leaf)
    unit = UNIT.to(dtype) if dtype == torch.float64 else UNIT
    absolute = terms.absolute_error(recon, target, valid, unit)
    huber = terms.huber_error(recon, target, valid, unit)
    excess = terms.range_excess(recon, valid, unit)
    for band, u, v, std in per_band(recon, target, leaf):
        error = np.abs(u - v) / std
        outside = np.where(u < 0, -u, np.where(u > 1, u - 1, 0)) / std
        bent = np.where(error < 1, error**2 / 2, error - 0.5)
        for term, expected in ((absolute, error), (huber, bent), (excess, outside**2)):
            assert float(term.total[band]) == pytest.approx(expected.sum(), rel=tolerance(dtype), abs=1e-5)
            assert int(term.count[band]) == len(u)


@given(st.integers(0, 1000), masks)
def test_the_signature_error_compares_mean_leaf_spectra_of_each_tile(seed, mask):
    recon, target, leaf = random_tiles(seed, 5, mask)
    result = terms.signature_error(recon, target, valid_elements(target, leaf), UNIT)
    expected, pixels = np.zeros(5), np.zeros(5)
    for tile in range(2):
        part = slice(tile, tile + 1)
        for band, u, v, std in per_band(recon[part], target[part], leaf[part]):
            if len(u):
                expected[band] += len(u) * ((u.mean() - v.mean()) / std) ** 2
                pixels[band] += len(u)
    np.testing.assert_allclose(result.total, expected, rtol=1e-3, atol=1e-5)
    assert result.count.tolist() == pixels.tolist()


@given(st.integers(0, 1000), masks, dtypes)
def test_cosine_distance_equals_the_reference(seed, mask, dtype):
    recon, target, leaf = random_tiles(seed, 5, mask, dtype=dtype)
    result = terms.cosine_distance(recon, target, has_spectrum(target, leaf))
    u, v = (leaf_spectra(image, leaf) for image in (recon, target))
    cosine = (u * v).sum(axis=1) / (np.linalg.norm(u, axis=1) * np.linalg.norm(v, axis=1))
    assert float(result.total) == pytest.approx((1 - cosine).sum(), rel=tolerance(dtype), abs=1e-6)
    assert int(result.count) == len(u)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("u", "expected"), [((0.25, 0.5), 0.0), ((-0.25, -0.5), 2.0), ((0.5, -0.25), 1.0), ((0.0, 0.0), 1.0)]
)
def test_equal_opposite_and_zero_spectra_have_finite_cosine_distances(u, expected, dtype):
    spectrum = torch.tensor(u).view(1, 2, 1, 1).to(dtype).requires_grad_()
    target = torch.tensor([0.25, 0.5]).view(1, 2, 1, 1).to(dtype)
    distance = terms.cosine_distance(spectrum, target, torch.ones(1, 1, 1, dtype=torch.bool)).total
    distance.backward()
    assert float(distance) == pytest.approx(expected, abs=1e-6)
    assert spectrum.grad is not None
    assert spectrum.grad.isfinite().all()


@given(st.integers(0, 1000), masks, dtypes)
def test_index_error_equals_the_reference(seed, mask, dtype):
    recon, target, leaf = random_tiles(seed, 5, mask, dtype=dtype)
    recon = recon - 0.3  # some values are below 0, which counts as 0
    result = terms.index_error(recon, target, valid_elements(target, leaf), PAIRS)
    everywhere = leaf.expand_as(target)
    for i, (a, b) in enumerate(PAIRS):
        both = everywhere[:, a] & everywhere[:, b]
        indices = []
        for image in (recon, target):
            first, second = (np.maximum(image[:, band][both].double().numpy(), 0) for band in (a, b))
            indices.append((first - second) / np.maximum(first + second, 1e-3))
        expected = np.abs(indices[0] - indices[1]).sum()
        assert float(result.total[i]) == pytest.approx(expected, rel=10 * tolerance(dtype), abs=1e-5)
        assert int(result.count[i]) == int(both.sum())


@given(st.integers(0, 1000), masks)
def test_kl_equals_the_reference_weighted_by_leaf_share(seed, mask):
    _, _, leaf = random_tiles(seed, 1, mask)
    generator = torch.Generator().manual_seed(seed)
    mean, logvar = (torch.randn(2, 4, 1, 2, generator=generator) for _ in range(2))
    result = terms.kl_divergence(mean, logvar, latent_coverage(leaf, 8))
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


def every_term(recon: torch.Tensor, target: torch.Tensor, leaf: torch.Tensor) -> dict[str, torch.Tensor]:
    valid, unit = valid_elements(target, leaf), UNIT.to(recon)
    return {
        "l1": terms.absolute_error(recon, target, valid, unit).total.sum(),
        "huber": terms.huber_error(recon, target, valid, unit).total.sum(),
        "range": terms.range_excess(recon, valid, unit).total.sum(),
        "signature": terms.signature_error(recon, target, valid, unit).total.sum(),
        "cosine": terms.cosine_distance(recon, target, has_spectrum(target, leaf)).total,
        "index": terms.index_error(recon, target, valid, PAIRS).total.sum(),
    }


@pytest.mark.parametrize("term", ["l1", "huber", "range", "signature", "cosine", "index"])
def test_gradients_equal_finite_differences(term):
    recon, target, leaf = random_tiles(0, 5, "random", (8, 8), torch.float64)
    recon = (recon * 1.5 - 0.2).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: every_term(r, target, leaf)[term], recon, eps=1e-7, atol=1e-4)


@pytest.mark.parametrize("term", ["l1", "huber", "range", "signature", "cosine", "index"])
@pytest.mark.parametrize("junk", [math.nan, math.inf, 1e30])
def test_background_never_reaches_a_term_or_its_gradient(term, junk):
    recon, target, leaf = random_tiles(1, 5, "random")
    results = []
    for r, t in ((recon.clone(), target), (torch.where(leaf, recon, junk), torch.where(leaf, target, junk))):
        value = every_term(r.requires_grad_(), t, leaf)[term]
        value.backward()
        results.append((value, r.grad))
    for clean, dirty in zip(*results, strict=True):
        assert clean.isfinite().all()
        assert torch.equal(clean, dirty)


def test_errors_of_mean_spectra_do_not_cancel_between_tiles():
    target = torch.full((2, 5, 8, 8), 0.4)
    recon = target + torch.tensor([0.1, -0.1]).view(2, 1, 1, 1)
    leaf = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    result = terms.signature_error(recon, target, valid_elements(target, leaf), torch.ones(5))
    assert result.mean().tolist() == pytest.approx([0.01] * 5)
