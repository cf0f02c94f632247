"""Every collective operation of a run. All ranks call each of these, in the same order."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from msvae.distributed.engine import Engine

Result = TypeVar("Result")


class Ranks:
    """The processes that train together. With one process, a collective returns its input."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank: int = accelerator.process_index
        self.world_size: int = accelerator.num_processes
        self.is_main: bool = accelerator.is_main_process
        self.is_local_main: bool = accelerator.is_local_main_process
        self.device: torch.device = accelerator.device
        self.engine = Engine(accelerator)

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def all_reduce_sums(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum tensors of any shapes over ranks, in one collective and in float64, so that counts stay exact."""
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        flat = torch.cat([tensor.detach().to(self.device, torch.float64).reshape(-1) for tensor in tensors.values()])
        self.all_reduce_sum(flat)
        parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
        return {name: part.reshape(shapes[name]) for name, part in zip(shapes, parts, strict=True)}

    def all_gather_int(self, number: int) -> list[int]:
        """Return one integer below 2^53 from every rank, in rank order."""
        column = torch.zeros(self.world_size, dtype=torch.float64)
        column[self.rank] = number
        return [int(value) for value in self.all_reduce_sums({"numbers": column})["numbers"].tolist()]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Return one JSON value from every rank, in rank order."""
        if self.world_size == 1:
            return [json.loads(json.dumps(value))]
        text = json.dumps(value).encode()
        lengths = self.all_gather_int(len(text))
        message = torch.zeros(max(lengths), dtype=torch.uint8, device=self.device)
        message[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        messages = [torch.empty_like(message) for _ in lengths]
        dist.all_gather(messages, message)
        padded = zip(messages, lengths, strict=True)
        return [json.loads(one[:length].cpu().numpy().tobytes()) for one, length in padded]

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Overwrite a tensor on every rank with the values it has on the source rank."""
        if self.world_size > 1:
            dist.broadcast(tensor, source)

    def broadcast_object(self, produce: Callable[[], Any], source: int = 0) -> Any:
        """Call `produce` on the source rank and return its result, a JSON value, on every rank.

        Raises: ValueError on every rank if `produce` raises one.
        """
        text = b""
        if self.rank == source:
            try:
                text = json.dumps({"result": produce()}).encode()
            except ValueError as error:
                text = json.dumps({"error": str(error)}).encode()
        length = torch.tensor(len(text), device=self.device)
        self.broadcast(length, source)
        message = torch.zeros(int(length), dtype=torch.uint8, device=self.device)
        if self.rank == source:
            message.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        self.broadcast(message, source)
        answer = json.loads(message.cpu().numpy().tobytes())
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["result"]

    def run_on_all(self, action: Callable[[], Result]) -> Result:
        """Call `action` on every rank and return each rank's own result.

        Raises: ValueError on every rank if one rank raises it: the error of the first such rank.
        """
        result, error_text = None, ""
        try:
            result = action()
        except ValueError as error:
            error_text = str(error)
        failures = self.all_gather_int(bool(error_text))
        if any(failures):
            first = failures.index(True)
            raise ValueError(self.broadcast_object(lambda: error_text, first))
        return cast(Result, result)

    def send(self, tensor: Tensor, peer: int) -> None:
        """Send a tensor to one other rank, which calls `recv`."""
        dist.send(tensor, peer)

    def recv(self, tensor: Tensor, peer: int) -> None:
        """Overwrite a tensor with the one that another rank sends."""
        dist.recv(tensor, peer)

    def barrier(self) -> None:
        """Return when every rank has called this."""
        if self.world_size > 1:
            dist.barrier()
