"""The engine under which the ranks train: one process, DDP or DeepSpeed ZeRO."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from msvae.distributed.deepspeed_settings import apply_run_settings


class Engine:
    """The engine of Accelerate that the launcher chose."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        plugin = accelerator.state.deepspeed_plugin
        self.uses_deepspeed: bool = plugin is not None
        self.zero_stage: int = plugin.zero_stage if plugin is not None else 0
        """Stage of ZeRO; 0 without DeepSpeed."""
        kind = str(accelerator.distributed_type.value)
        self.name = f"{kind}, ZeRO {self.zero_stage}" if self.uses_deepspeed else kind
        """Name of the engine, such as `MULTI_GPU` or `DEEPSPEED, ZeRO 2`."""

    @property
    def shards_weights(self) -> bool:
        """True under ZeRO 3, where no rank holds all weights."""
        return self.zero_stage == 3

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model in DDP, or the model itself on one process."""
        wrapped: nn.Module = self._accelerator.prepare_model(model)
        return wrapped

    def wrap_with_deepspeed(
        self, model: nn.Module, optimizer: Optimizer, max_norm: float, accumulation_steps: int
    ) -> Any:
        """Return DeepSpeed's engine, which shards the model and its optimizer over the ranks."""
        config = self._accelerator.state.deepspeed_plugin.deepspeed_config
        apply_run_settings(config, max_norm, accumulation_steps, self._accelerator.num_processes)
        self._accelerator.gradient_accumulation_steps = accumulation_steps
        engine, _ = self._accelerator.prepare(model, optimizer)
        return engine

    def local_main_first(self) -> AbstractContextManager[None]:
        """Run a block on the first rank of each machine first, so that the other ranks find the files it downloads."""
        block: AbstractContextManager[None] = self._accelerator.local_main_process_first()
        return block
