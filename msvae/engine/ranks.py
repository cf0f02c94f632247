"""Every collective of a run. All ranks call each of these, in the same order."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class Ranks:
    """The processes that train together."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.device: torch.device = accelerator.device

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add tensors of any shapes over ranks, in one collective and in float64, so that counts stay exact."""
        shapes = {name: value.shape for name, value in values.items()}
        flat = torch.cat([value.detach().to(self.device, torch.float64).reshape(-1) for value in values.values()])
        joined = self._accelerator.reduce(flat, reduction="sum").split([shape.numel() for shape in shapes.values()])
        return {name: part.reshape(shapes[name]) for name, part in zip(shapes, joined, strict=True)}

    def gather(self, number: int) -> list[int]:
        """One whole number under 2^53 of every rank, in rank order."""
        column = torch.zeros(self.world_size, dtype=torch.float64)
        column[self.rank] = number
        return [int(value) for value in self.sum({"numbers": column})["numbers"].tolist()]

    def wait(self) -> None:
        """Return when every rank has come here."""
        self._accelerator.wait_for_everyone()
