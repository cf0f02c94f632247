"""Monitoring of a run: coverage and bad values of the data, and steps that changed nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from msvae.config import Config, DataConfig
from msvae.losses.objective import can_compare
from msvae.messages import counted
from msvae.shards.order import SampleOrder
from msvae.shards.reader import ShardReader

NUM_NAMED_TILES = 3
"""Number of tiles that a warning names."""
NUM_NAMED_SAMPLES = 8
"""Largest number of samples that the error about consecutive steps without a finite loss names."""

Warn = Callable[[str], None]


class DataMonitor:
    """Checks the counts of global batches. They stay on the device until `check`, and are equal on all ranks."""

    def __init__(self, config: DataConfig, reader: ShardReader, order: SampleOrder) -> None:
        self._config, self._reader, self._order = config, reader, order
        self._bad: set[tuple[int, int]] = set()
        self._steps: list[int] = []
        self._counts: list[Mapping[str, Tensor]] = []

    def state_dict(self) -> list[tuple[int, int]]:
        """Return shard and row of each sample that could not be read, for a checkpoint."""
        return sorted(self._bad)

    def load_state_dict(self, state: Iterable[Sequence[int]]) -> None:
        """Continue from the state of a checkpoint."""
        self._bad = {(shard, row) for shard, row in state}

    def add(self, step: int, counts: Mapping[str, Tensor]) -> None:
        """Add the counts of the global batch of a step, summed over ranks."""
        self._steps.append(step)
        self._counts.append(counts)

    def check(self, warn: Warn | None) -> None:
        """Check the global batches since the last call, and pass warnings to `warn`, which only the main process has.

        Raises: ValueError if more leaf values are not finite than `max_nonfinite_share` allows, or more samples could
            not be read than `max_bad_samples` allows.
        """
        if not self._counts:
            return
        coverage_ST, bad_ST = (
            torch.stack([counts[name] for counts in self._counts]).cpu() for name in ("tile_coverage", "bad_slots")
        )
        nonfinite, leaf = (
            int(torch.stack([counts[name] for counts in self._counts]).sum())
            for name in ("nonfinite_elements", "leaf_elements")
        )
        steps = self._steps
        self._steps, self._counts = [], []
        self._check_finite(steps, nonfinite, leaf)
        new_bad = self._check_readable(steps, bad_ST)
        if warn is None:
            return
        if new_bad:
            were = "was" if len(new_bad) == 1 else "were"
            warn(
                f"warning: {counted(len(new_bad), 'sample')} {_span(steps)} could not be read and {were} replaced: "
                f"{_last_names(new_bad)}; the reasons are in bad-samples/"
            )
        if nonfinite:
            warn(f"warning: {nonfinite:,} of {leaf:,} leaf values {_span(steps)} are not finite and were left out")
        self._warn_of_coverage(warn, "low", steps, coverage_ST, self._config.low_coverage)
        self._warn_of_coverage(warn, "high", steps, coverage_ST, self._config.high_coverage)

    def _check_finite(self, steps: list[int], nonfinite: int, leaf: int) -> None:
        limit = self._config.max_nonfinite_share
        if nonfinite > limit * leaf:
            raise ValueError(
                f"{nonfinite:,} of {leaf:,} leaf values {_span(steps)} are not finite, more than "
                f"data.max_nonfinite_share {limit:g} allows; mask these pixels and pack "
                f"{self._reader.store.location} again, or raise the share"
            )

    def _check_readable(self, steps: list[int], bad_ST: Tensor) -> list[str]:
        """Return the names of new bad samples. Each rank counts the bad samples of all ranks, so all stop together."""
        new = []
        for row, slot in bad_ST.nonzero().tolist():
            sample = self._order.samples(steps[row] - 1, bad_ST.shape[1], [slot])[0][:2]
            if sample not in self._bad:
                self._bad.add(sample)
                new.append(self._reader.sample_name(*sample))
        if new and len(self._bad) > self._config.max_bad_samples:
            raise ValueError(
                f"{counted(len(self._bad), 'sample')} could not be read, more than data.max_bad_samples "
                f"{self._config.max_bad_samples} allows, the last ones {_last_names(new)}; restore them from their "
                "source"
            )
        return new

    def _warn_of_coverage(self, warn: Warn, kind: str, steps: list[int], coverage_ST: Tensor, limit: float) -> None:
        """Warn of global batches with a low or high coverage, and name the tiles of the worst one."""
        sign, side, tiles = (1, "under", "emptiest") if kind == "low" else (-1, "above", "fullest")
        coverage_S = coverage_ST.mean(dim=1)
        if number := int((sign * coverage_S < sign * limit).sum()):
            worst = int((sign * coverage_S).argmin())
            batches = counted(len(steps), "global batch", "global batches")
            slots = (sign * coverage_ST[worst]).argsort(stable=True)[:NUM_NAMED_TILES].tolist()
            warn(
                f"warning: {kind} coverage: {number} of {batches} {_span(steps)} had a leaf share {side} {limit:g}; "
                f"step {steps[worst]} has {coverage_S[worst]:.3f}, its {tiles} tiles are "
                f"{self._tile_names(steps[worst], coverage_ST[worst], slots)}"
            )

    def _tile_names(self, step: int, coverage_T: Tensor, slots: list[int]) -> str:
        """Return key and coverage of the tiles in some slots of the global batch of a step."""
        samples = self._order.samples(step - 1, len(coverage_T), slots)
        names = [self._reader.sample_name(sample.shard, sample.row) for sample in samples]
        return ", ".join(f"{name} ({coverage_T[slot]:.3f})" for name, slot in zip(names, slots, strict=True))


class SkippedSteps:
    """Counts steps that changed nothing: without leaf values, or with a loss or gradient that is not finite.

    Flags stay on the device until `check`. They are equal on all ranks, because counts and gradients are combined
    over all ranks.
    """

    def __init__(self, config: Config, order: SampleOrder, reader: ShardReader) -> None:
        self._max_in_a_row, self._order, self._reader = config.train.max_nonfinite_steps, order, reader
        self._global_batch_size, self._weights = config.data.global_batch_size, config.loss.weights
        self._unchecked: list[tuple[int, Tensor, Tensor]] = []
        self.empty, self.nonfinite, self._in_a_row = 0, 0, 0

    def add(self, step: int, grad_norm: Tensor, counts: Mapping[str, Tensor]) -> None:
        """Add a step. Args: gradient norm from `Stepper.step`; counts of the global batch, summed over ranks."""
        self._unchecked.append((step, can_compare(counts, self._weights), grad_norm.isfinite()))

    def check(self, warn: Warn | None) -> None:
        """Count the steps since the last call, and pass warnings to `warn`, which only the main process has.

        Raises: ValueError if loss or gradient of too many consecutive steps were not finite.
        """
        if not self._unchecked:
            return
        empty_before, nonfinite_before = self.empty, self.nonfinite
        steps = [step for step, *_ in self._unchecked]
        flags = torch.stack([torch.stack([has_target, finite]) for _, has_target, finite in self._unchecked]).tolist()
        self._unchecked = []
        for step, (has_target, finite) in zip(steps, flags, strict=True):
            if not has_target:
                self.empty += 1
                continue
            self.nonfinite += not finite
            self._in_a_row = 0 if finite else self._in_a_row + 1
            if self._in_a_row >= self._max_in_a_row:
                raise ValueError(self._too_many(step))
        if warn is not None:
            if empty := self.empty - empty_before:
                share = f"{empty} of the last {len(steps)}"
                warn(f"warning: {share} steps had no leaf value to compare with and were skipped")
            if nonfinite := self.nonfinite - nonfinite_before:
                share = f"{nonfinite} of the last {len(steps)}"
                warn(f"warning: {share} losses or gradients were not finite and changed nothing")

    def state_dict(self) -> dict[str, int]:
        """Return the counts for a checkpoint."""
        return {"empty": self.empty, "nonfinite": self.nonfinite, "in_a_row": self._in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of a checkpoint."""
        self.empty, self.nonfinite, self._in_a_row = state["empty"], state["nonfinite"], state["in_a_row"]

    def _too_many(self, step: int) -> str:
        samples = self._order.samples(step - 1, self._global_batch_size, range(self._global_batch_size))
        names = [self._reader.sample_name(sample.shard, sample.row) for sample in samples[:NUM_NAMED_SAMPLES]]
        more = f" and {len(samples) - NUM_NAMED_SAMPLES} more" if len(samples) > NUM_NAMED_SAMPLES else ""
        return (
            f"the losses or gradients of {counted(self._in_a_row, 'consecutive step')}, up to step {step}, were not "
            f"finite and changed nothing; the last step had the samples {', '.join(names)}{more}. Lower optim.lr, "
            "inspect these tiles, or raise train.max_nonfinite_steps"
        )


def _last_names(names: list[str]) -> str:
    return ", ".join(names[-NUM_NAMED_TILES:]) + (" and others" if len(names) > NUM_NAMED_TILES else "")


def _span(steps: list[int]) -> str:
    return f"at step {steps[0]}" if len(steps) == 1 else f"from step {steps[0]} to {steps[-1]}"
