"""Launched by other benchmarks: a training run that writes the duration of each part of its steps as JSON."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from msvae.config import load_config
from msvae.distributed.exit_codes import run_script
from msvae.distributed.setup import join_ranks
from msvae.training.trainer import Trainer

PARTS = {
    "model and gradients": ("stepper", "step"),
    "wait for data": ("", "_next"),
    "collectives besides gradients": ("ranks", "all_reduce_sums"),
    "logging": ("", "_check_and_log"),
    "checkpoint": ("", "_evaluate_and_save"),
    "snapshot": ("writer", "save"),
}
"""Timed methods: an attribute of the trainer, or the trainer itself, and the name of its method."""
NUM_WARM_UP = 2
MIN_STEPS = NUM_WARM_UP + 2
"""Smallest number of steps, because a step is timed from its start to the start of the next one."""


def main() -> None:
    """Train, and write means over steps in seconds."""
    out, *overrides = sys.argv[1:]
    config = load_config(None, overrides)
    if config.train.max_steps < MIN_STEPS:
        raise ValueError(
            f"got {config.train.max_steps} steps, expected {MIN_STEPS} or more, because the first ones warm up; "
            "raise train.max_steps"
        )
    trainer = Trainer(config, join_ranks(config.train.timeout_s))
    spent_s: dict[str, list[float]] = defaultdict(list)
    step_began_s: list[float] = []
    for part, (owner, method) in PARTS.items():
        held = getattr(trainer, owner) if owner else trainer
        setattr(
            held,
            method,
            _timed(getattr(held, method), spent_s[part], step_began_s if part.startswith("model") else []),
        )
    trainer.fit()
    if trainer.ranks.is_main:
        steps_s = [after - before for before, after in pairwise(step_began_s[NUM_WARM_UP:])]
        means = {part: statistics.fmean(values[NUM_WARM_UP:] or values) for part, values in spent_s.items()}
        Path(out).write_text(json.dumps({"step": statistics.fmean(steps_s), **means}))


def _timed(act: Callable[..., Any], spent_s: list[float], began_s: list[float]) -> Callable[..., Any]:
    def timed(*arguments: Any, **options: Any) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        began = time.perf_counter()
        began_s.append(began)
        done = act(*arguments, **options)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent_s.append(time.perf_counter() - began)
        return done

    return timed


if __name__ == "__main__":
    run_script(main)
