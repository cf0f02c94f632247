"""The objective: chosen terms, sums over micro batches, compilation, and host synchronisation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from msvae.bands import Bands
from msvae.losses.coverage import mask_stats
from msvae.losses.objective import TERMS, LeafLosses, objective
from msvae.losses.terms import MaskedSum

from .tiles import masks, random_tiles

ALL = LeafLosses(TERMS, Bands(), downscale=8)
UNIT = torch.tensor([0.1, 0.2, 0.1, 0.3, 0.5])


def posterior(leaf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(leaf.device if leaf.device.type == "cpu" else "cpu").manual_seed(0)
    shape = (len(leaf), 4, leaf.shape[2] // 8, leaf.shape[3] // 8)
    return tuple(torch.randn(shape, generator=generator).to(leaf.device) for _ in range(2))


@given(st.integers(0, 1000), masks, masks)
def test_shares_of_micro_batches_add_up_to_the_loss_of_the_global_batch(seed, first, second):
    """The loss is not a mean of means: the weight of a micro batch is its number of leaf elements."""
    weights = {term: 0.5 + i for i, term in enumerate(TERMS)}
    parts = [random_tiles(seed, 5, first), random_tiles(seed + 1, 5, second)]
    parts = [(recon, target, leaf.expand_as(target)) for recon, target, leaf in parts]
    whole = tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))

    def sums(recon: torch.Tensor, target: torch.Tensor, leaf: torch.Tensor) -> dict[str, MaskedSum]:
        return ALL.sums(recon, target, leaf, UNIT, posterior(leaf))

    counts = ALL.counts(whole[1], whole[2])
    shares = sum(float(objective(sums(*part), counts, weights)) for part in parts)
    joined = {
        term: MaskedSum(sums(*parts[0])[term].total + sums(*parts[1])[term].total, counts[term]) for term in TERMS
    }
    assert shares == pytest.approx(sum(w * float(joined[term].overall()) for term, w in weights.items()), rel=1e-5)
    own = sums(*whole)
    for term in TERMS:
        assert torch.equal(own[term].count, counts[term]), term
        if term != "kl":  # each part has its own posterior
            assert float(own[term].overall()) == pytest.approx(float(joined[term].overall()), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("chosen", [("mse",), ("sam",), ("l1", "index"), ("huber", "kl"), TERMS])
def test_a_term_that_is_not_chosen_is_not_computed(chosen, monkeypatch):
    computed = []
    for name, function in (
        ("l1", "absolute_error"),
        ("huber", "huber_error"),
        ("range", "range_excess"),
        ("signature", "signature_error"),
        ("cosine", "cosine_distance"),
        ("index", "index_error"),
        ("kl", "kl_divergence"),
    ):
        original = getattr(ALL.sums.__globals__["terms"], function)
        monkeypatch.setattr(
            ALL.sums.__globals__["terms"],
            function,
            lambda *a, name=name, original=original: (computed.append(name), original(*a))[1],
        )
    fused = ALL.sums.__globals__["error_and_angle"]
    monkeypatch.setitem(ALL.sums.__globals__, "error_and_angle", lambda *a: (computed.append("sam"), fused(*a))[1])
    recon, target, leaf = random_tiles(0, 5, "random")
    losses = LeafLosses(chosen, Bands(), downscale=8)
    sums = losses.sums(recon, target, leaf, UNIT, posterior(leaf))
    assert tuple(sums) == tuple(chosen)
    assert set(computed) == set(chosen) - {"mse"}
    assert tuple(losses.counts(target, leaf)) == tuple(chosen)


def test_errors_are_in_units_of_the_standard_deviation_of_each_band():
    recon, target, leaf = random_tiles(0, 5, "random")
    sums = ALL.sums(recon, target, leaf, UNIT)
    for band, unit in enumerate(UNIT.double().tolist()):
        chosen = (recon[:, band].double() - target[:, band].double())[leaf[:, 0]] / unit
        assert float(sums["mse"].total[band]) == pytest.approx(float(chosen.square().sum()), rel=1e-5)
        assert float(sums["l1"].total[band]) == pytest.approx(float(chosen.abs().sum()), rel=1e-5)


def test_wrong_terms_are_errors_that_say_what_is_expected():
    with pytest.raises(ValueError, match=r"unknown loss terms ssim; expected some of mse, l1"):
        LeafLosses(("mse", "ssim"), Bands(), downscale=8)
    with pytest.raises(ValueError, match=r"2 bands \(475, 560 nm\), the term `index` needs near infrared"):
        LeafLosses(("index",), Bands.of_wavelengths((475.0, 560.0)), downscale=8)


def whole_loss(recon: torch.Tensor, target: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    sums = ALL.sums(recon, target, leaf, UNIT.to(recon.device), posterior(leaf))
    total = torch.stack([masked_sum.overall() for masked_sum in sums.values()]).sum()
    stats = mask_stats(leaf)
    return total + 0 * (stats["coverage"] + stats["histogram"].sum() + stats["min_coverage"])


def test_losses_compile_to_one_graph_and_only_once_for_any_coverage():
    def loss(recon: torch.Tensor, target: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        sums = ALL.sums(recon, target, leaf, UNIT)
        return torch.stack([masked_sum.overall() for masked_sum in sums.values()]).sum() + mask_stats(leaf)["coverage"]

    compiled = torch.compile(loss, fullgraph=True)
    for i, mask in enumerate(("random", "full", "empty", "one pixel")):
        recon, target, leaf = random_tiles(i, 5, mask)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            ours, theirs = (recon.clone().requires_grad_() for _ in range(2))
            compiled(ours, target, leaf).backward()
        loss(theirs, target, leaf).backward()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_losses_never_wait_for_the_device():
    """Tensors on the meta device have no values, so every host synchronisation fails."""
    recon, target, leaf = (tensor.to("meta") for tensor in random_tiles(0, 5, "random"))
    whole_loss(recon.requires_grad_(), target, leaf).backward()
    ALL.counts(target, leaf)
    with pytest.raises(RuntimeError, match=r"meta"):
        float(target.sum())
