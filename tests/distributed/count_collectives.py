"""Launched by a test: trains, and records every collective of this rank."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from msvae.config import load_config
from msvae.distributed.setup import join_ranks
from msvae.training.trainer import Trainer


class Record(TorchDispatchMode):
    """Records name, type and number of elements of each collective of torch, whoever calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, int]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            kind = tensors[0].dtype if tensors else torch.uint8
            self.seen.append((function.name().removeprefix("c10d::"), str(kind), sum(t.numel() for t in tensors)))
        return function(*args, **(kwargs or {}))


out, *overrides = sys.argv[1:]
trainer = Trainer(load_config(None, overrides), join_ranks())
record, rows = Record(), []
step = trainer.stepper.step


def counted_step(*arguments: Any) -> Any:
    """Run a step. Collectives since the previous step are not those of gradients."""
    other, record.seen = record.seen, []
    result = step(*arguments)
    rows.append({"other": other, "gradients": record.seen})
    record.seen = []
    return result


trainer.stepper.step = counted_step
fit: Callable[[], bool] = trainer.fit
with record:
    fit()
rows.append({"other": record.seen, "gradients": []})
Path(out, f"rank-{trainer.ranks.rank}.json").write_text(json.dumps(rows))
