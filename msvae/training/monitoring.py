"""Watching the data that a run trains on: coverage of the global batches, and values that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from msvae.config import DataConfig
from msvae.losses.coverage import tile_stats
from msvae.messages import counted
from msvae.shards.order import SampleOrder
from msvae.shards.reader import ShardReader

NUM_NAMED = 3
"""Tiles that a warning names."""

Warn = Callable[[str], None]


class DataWatch:
    """Keeps what was counted of each global batch, on the device, until it is looked at. Equal on all ranks."""

    def __init__(self, config: DataConfig, reader: ShardReader, order: SampleOrder) -> None:
        self._config, self._reader, self._order = config, reader, order
        self._bad: set[tuple[int, int]] = set()
        self._steps: list[int] = []
        self._seen: list[Mapping[str, Tensor]] = []

    def state(self) -> list[tuple[int, int]]:
        """Shard and row of each sample that could not be read, to be saved."""
        return sorted(self._bad)

    def resume(self, state: Iterable[Sequence[int]]) -> None:
        """Go on from a saved state."""
        self._bad = {(shard, row) for shard, row in state}

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
        coverage_ST, bad_ST = (
            torch.stack([counts[name] for counts in self._seen]).cpu() for name in ("tile_coverage", "bad_slots")
        )
        nonfinite, leaf = (
            int(torch.stack([counts[name] for counts in self._seen]).sum())
            for name in ("nonfinite_elements", "leaf_elements")
        )
        steps = self._steps
        self._steps, self._seen = [], []
        self._check_finite(steps, nonfinite, leaf)
        new_bad = self._check_readable(steps, bad_ST)
        if warn is None:
            return
        if new_bad:
            were = "was" if len(new_bad) == 1 else "were"
            warn(
                f"warning: {counted(len(new_bad), 'sample')} {_span(steps)} could not be read and {were} replaced: "
                f"{_some(new_bad)}; the reasons are in bad-samples/"
            )
        if nonfinite:
            warn(f"warning: {nonfinite:,} of {leaf:,} leaf values {_span(steps)} are not finite and were left out")
        self._warn_beyond(warn, "low", "under", "emptiest", steps, coverage_ST, self._config.low_coverage)
        self._warn_beyond(warn, "high", "above", "fullest", steps, coverage_ST, self._config.high_coverage)

    def _check_finite(self, steps: list[int], nonfinite: int, leaf: int) -> None:
        limit = self._config.max_nonfinite_share
        if nonfinite > limit * leaf:
            raise ValueError(
                f"{nonfinite:,} of {leaf:,} leaf values {_span(steps)} are not finite, more than "
                f"data.max_nonfinite_share {limit:g} allows; mask these pixels and pack "
                f"{self._reader.store.location} again, or raise the share"
            )

    def _check_readable(self, steps: list[int], bad_ST: Tensor) -> list[str]:
        """Names of the samples found bad for the first time. All ranks know of all of them, so they stop together."""
        new = []
        for row, slot in bad_ST.nonzero().tolist():
            place = self._order.samples(steps[row] - 1, bad_ST.shape[1], [slot])[0][:2]
            if place not in self._bad:
                self._bad.add(place)
                new.append(self._reader.sample_name(*place))
        if new and len(self._bad) > self._config.max_bad_samples:
            raise ValueError(
                f"{counted(len(self._bad), 'sample')} could not be read, more than data.max_bad_samples "
                f"{self._config.max_bad_samples} allows, the last ones {_some(new)}; restore them from their source"
            )
        return new

    def _warn_beyond(
        self, warn: Warn, kind: str, side: str, tiles: str, steps: list[int], coverage_ST: Tensor, limit: float
    ) -> None:
        sign = 1 if side == "under" else -1
        coverage_S = coverage_ST.mean(dim=1)
        if number := int((sign * coverage_S < sign * limit).sum()):
            worst = int((sign * coverage_S).argmin())
            batches = counted(len(steps), "global batch", "global batches")
            slots = (sign * coverage_ST[worst]).argsort(stable=True)[:NUM_NAMED].tolist()
            warn(
                f"warning: {kind} coverage: {number} of {batches} {_span(steps)} with a leaf share {side} {limit:g}; "
                f"step {steps[worst]} has {coverage_S[worst]:.3f}, its {tiles} tiles are "
                f"{self._named(steps[worst], coverage_ST[worst], slots)}"
            )

    def _named(self, step: int, coverage_T: Tensor, slots: list[int]) -> str:
        """Keys of tiles of the global batch of a step, which has position `step - 1`."""
        samples = self._order.samples(step - 1, len(coverage_T), slots)
        names = [self._reader.sample_name(sample.shard, sample.row) for sample in samples]
        return ", ".join(f"{name} ({coverage_T[slot]:.3f})" for name, slot in zip(names, slots, strict=True))


def coverage_row(counts: Mapping[str, Tensor], world_size: int = 1) -> dict[str, Any]:
    """What the log says of the coverage of a global batch, which ranks share in equal slices."""
    coverage_T = counts["tile_coverage"].cpu()
    coverage_R = coverage_T.view(world_size, -1).mean(dim=1)
    stats = tile_stats(coverage_T)
    return {
        "coverage": float(counts["valid_pixels"] / counts["total_pixels"]),
        "coverage_min": float(stats["min_coverage"]),
        "coverage_max": float(stats["max_coverage"]),
        "coverage_skew": float(coverage_R.max() - coverage_R.min()),
        "coverage_histogram": stats["histogram"].tolist(),
        "valid_pixels": int(counts["valid_pixels"]),
        "empty_tiles": int(stats["empty_tiles"]),
        "empty_share": float(stats["empty_tiles"] / stats["tiles"]),
        "nonfinite_elements": int(counts["nonfinite_elements"]),
        "bad_samples": int(counts["bad_slots"].sum()),
    }


def _some(names: list[str]) -> str:
    return ", ".join(names[-NUM_NAMED:]) + (" and others" if len(names) > NUM_NAMED else "")


def _span(steps: list[int]) -> str:
    return f"at step {steps[0]}" if len(steps) == 1 else f"from step {steps[0]} to {steps[-1]}"
