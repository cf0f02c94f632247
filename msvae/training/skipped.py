"""Steps that changed nothing: of a global batch without leaf values, or with a loss or gradient that is not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from msvae.config import Config
from msvae.losses.objective import can_compare
from msvae.shards.order import SampleOrder
from msvae.shards.reader import ShardReader

NUM_NAMED = 8
"""Samples that an error names."""


class SkippedSteps:
    """Counts on the device until it is looked at. Equal on all ranks, as the norm is of the joined gradient."""

    def __init__(self, config: Config, order: SampleOrder, reader: ShardReader) -> None:
        self._max_in_a_row, self._order, self._reader = config.train.max_nonfinite_steps, order, reader
        self._global_batch_size, self._weights = config.data.global_batch_size, config.loss.weights
        self._seen: list[tuple[int, Tensor, Tensor]] = []
        self.empty, self.nonfinite, self._in_a_row = 0, 0, 0

    def add(self, step: int, norm: Tensor, counts: Mapping[str, Tensor]) -> None:
        """What `Stepper.step` says of the gradient, and the joined counts of its global batch."""
        self._seen.append((step, can_compare(counts, self._weights), norm.isfinite()))

    def look(self, warn: Callable[[str], None] | None) -> None:
        """Count what was added since the last look; warn of it where there is somewhere to say it.

        Raises: ValueError when too many losses or gradients in a row were not finite.
        """
        if not self._seen:
            return
        before = self.empty, self.nonfinite
        steps = [step for step, *_ in self._seen]
        flags = torch.stack([torch.stack([has_target, finite]) for _, has_target, finite in self._seen]).tolist()
        self._seen = []
        for step, (has_target, finite) in zip(steps, flags, strict=True):
            if not has_target:
                self.empty += 1
                continue
            self.nonfinite += not finite
            self._in_a_row = 0 if finite else self._in_a_row + 1
            if self._in_a_row >= self._max_in_a_row:
                raise ValueError(self._too_many(step))
        if warn is not None:
            if empty := self.empty - before[0]:
                share = f"{empty} of the last {len(steps)}"
                warn(f"warning: {share} steps had no leaf value to compare with and were skipped")
            if nonfinite := self.nonfinite - before[1]:
                share = f"{nonfinite} of the last {len(steps)}"
                warn(f"warning: {share} losses or gradients were not finite and changed nothing")

    def state(self) -> dict[str, int]:
        """To be saved."""
        return {"empty": self.empty, "nonfinite": self.nonfinite, "in_a_row": self._in_a_row}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        self.empty, self.nonfinite, self._in_a_row = state["empty"], state["nonfinite"], state["in_a_row"]

    def _too_many(self, step: int) -> str:
        places = self._order.samples(step - 1, self._global_batch_size, range(self._global_batch_size))
        names = [self._reader.sample_name(place.shard, place.row) for place in places[:NUM_NAMED]]
        more = f" and {len(places) - NUM_NAMED} more" if len(places) > NUM_NAMED else ""
        return (
            f"the losses or gradients of {self._in_a_row} steps in a row, up to step {step}, were not finite and "
            f"changed nothing; the last was of samples {', '.join(names)}{more}. Lower optim.lr, look at these "
            "tiles or raise train.max_nonfinite_steps"
        )
