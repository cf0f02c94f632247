"""All checks: each rank looks at itself, all tell each other, then they measure what lies between them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.distributed.exit_codes import lost_ranks_message
from msvae.distributed.setup import join_ranks
from msvae.doctor import clocks, devices, disks, launch, machine, network, shards, versions, weights
from msvae.doctor.patience import Deadline
from msvae.doctor.row import Facts, Row
from msvae.doctor.scene import Scene

MARGIN_S = 10.0
Findings = dict[str, Any]
"""What one rank found, by check."""


def examine(config: Config | None, timeout_s: float) -> list[Row]:
    """Join the other ranks and look at everything. All ranks return the same rows, unless they could not join.

    Args: how long one rank may look at itself; others wait twice as long for it, then say that it is lost.
    """
    try:
        accelerator = join_ranks(2 * timeout_s + MARGIN_S)
    except (ValueError, RuntimeError) as error:
        return _alone(config, timeout_s, _first_line(error))
    ranks = Ranks(accelerator)
    own = _look(Scene(config, ranks.world_size, ranks.device), accelerator, timeout_s)
    try:
        findings = ranks.all_gather_object(own)
        between = _measure(ranks, findings)
    except RuntimeError as error:
        if lost_ranks_message(error) is None:
            raise
        lost = f"then one was lost or stood still ({_first_line(error)})"
        return _judge([own], config, ranks.world_size, lost)
    return [*_judge(findings, config, ranks.world_size, ""), *between]


def _alone(config: Config | None, timeout_s: float, why: str) -> list[Row]:
    return _judge([_look(Scene(config, 1, _device()), None, timeout_s)], config, 1, why)


def _look(scene: Scene, accelerator: Accelerator | None, timeout_s: float) -> Findings:
    """Fails never, so that this rank comes to the collectives of the others."""
    config, deadline = scene.config, Deadline(timeout_s)
    looks = {
        "launch": partial(launch.look, scene, accelerator),
        "devices": partial(devices.look, scene),
        "machine": partial(machine.look, scene),
        "versions": partial(versions.look, scene),
        "disks": partial(disks.look, scene),
    }
    if config is not None:
        looks |= {f"shards {split}": partial(shards.look, scene, place) for split, place in _splits(config).items()}
    # last: one rank of each machine alone does this, and all should read shards at the same time
    looks["weights"] = partial(weights.look, scene)
    return {name: deadline.look(look) for name, look in looks.items()}


def _measure(ranks: Ranks, findings: list[Findings]) -> list[Row]:
    if ranks.world_size == 1:
        return []
    hosts = [found["launch"].get("host", "?") for found in findings]
    firsts = [rank for rank, found in enumerate(findings) if found["launch"].get("local_rank", 0) == 0]
    ends = firsts if len(firsts) > 1 else list(range(ranks.world_size))
    gradient_bytes = weights.gradient_bytes([found["weights"] for found in findings])
    return [
        *network.judge(network.measure(ranks, ends), hosts, gradient_bytes),
        *clocks.judge(clocks.measure(ranks, firsts), hosts),
    ]


def _judge(findings: list[Findings], config: Config | None, joined: int, apart: str) -> list[Row]:
    facts: dict[str, Facts] = {name: [found[name] for found in findings] for name in findings[0]}
    rows = [
        *launch.judge(facts["launch"], apart),
        *devices.judge(facts["devices"]),
        *machine.judge(facts["machine"]),
        *versions.judge(facts["versions"]),
        *weights.judge(facts["weights"]),
        *disks.judge(facts["disks"], facts["weights"], config),
    ]
    if config is not None:
        rows += [] if apart else shards.judge_batch(config, joined)
        for split in _splits(config):
            rows += shards.judge(split, facts[f"shards {split}"], config, joined)
    return rows


def _splits(config: Config) -> dict[str, str]:
    return {"train": config.data.train} | ({} if config.data.val is None else {"val": config.data.val})


def _device() -> torch.device:
    """Of a rank that has not joined."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
