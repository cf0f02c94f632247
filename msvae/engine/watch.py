"""Watching the data that a run trains on: coverage of the global batches, and values that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from msvae.config import DataConfig
from msvae.losses.coverage import tile_stats
from msvae.shards.order import SampleOrder
from msvae.shards.reader import ShardReader

NUM_NAMED = 3
"""Tiles that a warning names."""

Warn = Callable[[str], None]


class DataWatch:
    """Keeps what was counted of each global batch, on the device, until it is looked at. Equal on all ranks."""

    def __init__(self, config: DataConfig, reader: ShardReader, order: SampleOrder) -> None:
        self._config, self._reader, self._order = config, reader, order
        self._steps: list[int] = []
        self._seen: list[Mapping[str, Tensor]] = []

    def add(self, step: int, counts: Mapping[str, Tensor]) -> None:
        """Counts of the global batch of a step, joined over ranks."""
        self._steps.append(step)
        self._seen.append(counts)

    def look(self, warn: Warn | None) -> None:
        """Warn of what was added since the last look, and forget it; the main process alone has somewhere to say it.

        Raises: ValueError when more leaf values were not finite than `max_nonfinite_share` allows.
        """
        if not self._seen:
            return
        coverage_ST = torch.stack([counts["tile_coverage"] for counts in self._seen]).cpu()
        nonfinite, leaf = (
            int(torch.stack([counts[name] for counts in self._seen]).sum())
            for name in ("nonfinite_elements", "leaf_elements")
        )
        steps = self._steps
        self._steps, self._seen = [], []
        self._check_finite(steps, nonfinite, leaf)
        if warn is None:
            return
        if nonfinite:
            warn(f"warning: {nonfinite:,} of {leaf:,} leaf values {_span(steps)} are not finite and were left out")
        self._warn_beyond(warn, "low", "under", "emptiest", steps, coverage_ST, self._config.low_coverage)
        self._warn_beyond(warn, "high", "above", "fullest", steps, coverage_ST, self._config.high_coverage)

    def _check_finite(self, steps: list[int], nonfinite: int, leaf: int) -> None:
        limit = self._config.max_nonfinite_share
        if nonfinite > limit * leaf:
            raise ValueError(
                f"{nonfinite:,} of {leaf:,} leaf values {_span(steps)} are not finite, more than "
                f"data.max_nonfinite_share {limit:g} allows; mask these pixels and pack {self._reader.folder} again, "
                "or raise the share"
            )

    def _warn_beyond(
        self, warn: Warn, kind: str, side: str, tiles: str, steps: list[int], coverage_ST: Tensor, limit: float
    ) -> None:
        sign = 1 if side == "under" else -1
        coverage_S = coverage_ST.mean(dim=1)
        if number := int((sign * coverage_S < sign * limit).sum()):
            worst = int((sign * coverage_S).argmin())
            slots = (sign * coverage_ST[worst]).argsort(stable=True)[:NUM_NAMED].tolist()
            warn(
                f"warning: {kind} coverage: {number} of {len(steps)} global batches {_span(steps)} have a leaf share "
                f"{side} {limit:g}; step {steps[worst]} has {coverage_S[worst]:.3f}, its {tiles} tiles are "
                f"{self._named(steps[worst], coverage_ST[worst], slots)}"
            )

    def _named(self, step: int, coverage_T: Tensor, slots: list[int]) -> str:
        """Keys of tiles of the global batch of a step, which has position `step - 1`."""
        places = [self._order.places(step - 1, len(coverage_T), range(slot, slot + 1))[0] for slot in slots]
        keys = [self._reader.key(place.shard, place.row) for place in places]
        return ", ".join(f"{key} ({coverage_T[slot]:.3f})" for key, slot in zip(keys, slots, strict=True))


def coverage_row(counts: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the log says of the coverage of a global batch."""
    coverage_T = counts["tile_coverage"].cpu()
    stats = tile_stats(coverage_T)
    return {
        "coverage": float(counts["valid_pixels"] / counts["total_pixels"]),
        "coverage_min": float(stats["min_coverage"]),
        "coverage_max": float(stats["max_coverage"]),
        "coverage_histogram": stats["histogram"].tolist(),
        "valid_pixels": int(counts["valid_pixels"]),
        "empty_tiles": int(stats["empty_tiles"]),
        "nonfinite_elements": int(counts["nonfinite_elements"]),
    }


def _span(steps: list[int]) -> str:
    return f"at step {steps[0]}" if len(steps) == 1 else f"from step {steps[0]} to {steps[-1]}"
