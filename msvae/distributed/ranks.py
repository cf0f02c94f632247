"""Every collective of a run. All ranks call each of these, in the same order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

Found = TypeVar("Found")


class Ranks:
    """The processes that train together."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.is_first_of_machine: bool = accelerator.is_local_main_process
        self.device: torch.device = accelerator.device

    def add(self, values: Tensor) -> None:
        """Replace a tensor by its sum over ranks."""
        if self.world_size > 1:
            dist.all_reduce(values)

    def sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add tensors of any shapes over ranks, in one collective and in float64, so that counts stay exact."""
        shapes = {name: value.shape for name, value in values.items()}
        joined = torch.cat([value.detach().to(self.device, torch.float64).reshape(-1) for value in values.values()])
        self.add(joined)
        parts = torch.split(joined, [shape.numel() for shape in shapes.values()])
        return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}

    def gather(self, number: int) -> list[int]:
        """One whole number under 2^53 of every rank, in rank order."""
        column = torch.zeros(self.world_size, dtype=torch.float64)
        column[self.rank] = number
        return [int(value) for value in self.sum({"numbers": column})["numbers"].tolist()]

    def send(self, values: Tensor, source: int = 0) -> None:
        """Give every rank what one holds, in place."""
        if self.world_size > 1:
            dist.broadcast(values, source)

    def told(self, find_out: Callable[[], Any], source: int = 0) -> Any:
        """What one rank finds out, of JSON's kinds, on all of them.

        Raises: ValueError on every rank when it finds an error.
        """
        text = b""
        if self.rank == source:
            try:
                text = json.dumps({"found": find_out()}).encode()
            except ValueError as error:
                text = json.dumps({"error": str(error)}).encode()
        length = torch.tensor(len(text), device=self.device)
        self.send(length, source)
        message = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            message.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self.send(message, source)
        told = json.loads(message.cpu().numpy().tobytes())
        if "error" in told:
            raise ValueError(told["error"])
        return told["found"]

    def together(self, act: Callable[[], Found]) -> Found:
        """What every rank finds out for itself, unless one fails.

        Raises: ValueError on every rank, that of the first one that fails.
        """
        found, failed = None, ""
        try:
            found = act()
        except ValueError as error:
            failed = str(error)
        failures = self.gather(bool(failed))
        if any(failures):
            first = failures.index(True)
            raise ValueError(self.told(lambda: failed, first))
        return cast(Found, found)

    def all_told(self, own: Any) -> list[Any]:
        """What every rank has found out, of JSON's kinds, in rank order."""
        if self.world_size == 1:
            return [json.loads(json.dumps(own))]
        text = json.dumps(own).encode()
        lengths = self.gather(len(text))
        message = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        message[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        messages = [torch.empty_like(message) for _ in lengths]
        dist.all_gather(messages, message)
        told = zip(messages, lengths, strict=True)
        return [json.loads(one[:length].cpu().numpy().tobytes()) for one, length in told]

    def give(self, values: Tensor, peer: int) -> None:
        """Send to one other rank, which takes."""
        dist.send(values, peer)

    def take(self, values: Tensor, peer: int) -> None:
        """Fill a tensor with what one other rank gives."""
        dist.recv(values, peer)

    def wait(self) -> None:
        """Return when every rank has come here."""
        if self.world_size > 1:
            dist.barrier()
