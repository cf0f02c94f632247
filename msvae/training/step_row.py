"""What the log says of an optimizer step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from msvae.bands import Bands
from msvae.config import Config
from msvae.losses.terms import MaskedSum
from msvae.training.monitoring import coverage_row


def step_row(
    config: Config, bands: Bands, totals: Mapping[str, Tensor], counts: Mapping[str, Tensor], world_size: int
) -> dict[str, Any]:
    """Loss, its terms and coverage.

    Args: sums behind each term and counts of the global batch, joined over ranks.
    """
    sums = {term: MaskedSum(total, counts[term]) for term, total in totals.items()}
    means = {term: float(masked_sum.overall()) for term, masked_sum in sums.items()}
    row: dict[str, Any] = {
        "loss": sum(weight * means[term] for term, weight in config.loss.weights.items()),
        **means,
    }
    if "sam" in means:
        row["angle_deg"] = math.degrees(means["sam"])
    row |= coverage_row(counts, world_size)
    if "mse" in sums:
        row["mse_per_channel"] = dict(zip(bands.tags, sums["mse"].mean().tolist(), strict=True))
    return row


def optimizer_row(config: Config, lr_share: float, grad_norm: float, squares: Tensor) -> dict[str, Any]:
    """Learning rates, gradient and average.

    Args: share of the peak learning rates; norm of the gradient; `Trained.squares_from_average`, joined over ranks.
    """
    optim = config.optim
    row: dict[str, Any] = {"lr": optim.lr * lr_share}
    if optim.backbone_lr is not None:
        row["lr_backbone"] = optim.backbone_lr * lr_share
    row["grad_norm"] = grad_norm if math.isfinite(grad_norm) else None
    if optim.ema_decay:
        distance, weights = squares.sqrt().tolist()
        row["ema_distance"] = distance / weights
    return row
