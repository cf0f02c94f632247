"""What the log says of an optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from msvae.bands import Bands
from msvae.config import Config
from msvae.engine.watch import coverage_row
from msvae.losses.masked_sum import MaskedSum


def step_row(
    config: Config, bands: Bands, totals: Mapping[str, Tensor], counts: Mapping[str, Tensor], lr_share: float
) -> dict[str, Any]:
    """Loss, its terms, coverage and rates.

    Args: sums behind each term and counts of the global batch, joined over ranks; share of the peak learning rates.
    """
    sums = {term: MaskedSum(total, counts[term]) for term, total in totals.items()}
    means = {term: float(masked_sum.overall()) for term, masked_sum in sums.items()}
    per_band = {}
    if "mse" in sums:
        per_band = {"mse_per_channel": dict(zip(bands.tags, sums["mse"].mean().tolist(), strict=True))}
    return {
        "loss": sum(weight * means[term] for term, weight in config.loss.weights.items()),
        **means,
        **coverage_row(counts),
        **_rates(config, lr_share),
        **per_band,
    }


def _rates(config: Config, lr_share: float) -> dict[str, float]:
    optim = config.optim
    own = {} if optim.backbone_lr is None else {"lr_backbone": optim.backbone_lr * lr_share}
    return {"lr": optim.lr * lr_share, **own}
