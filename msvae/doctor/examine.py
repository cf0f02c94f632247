"""Run all checks of the doctor in order.

Each rank collects facts about itself. All ranks exchange these facts, and then measure the network between them.
"""

from __future__ import annotations

from functools import partial

import torch

from msvae.config import Config
from msvae.distributed.collectives import Ranks
from msvae.distributed.exit_codes import lost_ranks_message
from msvae.distributed.setup import join_ranks
from msvae.doctor import inputs, launch, machine, network
from msvae.doctor.row import Context, Deadline, Facts, OwnFacts, Row

MARGIN_S = 10.0
"""Time that ranks wait for a slow rank in addition to twice the time limit, in seconds."""
RankFacts = dict[str, OwnFacts]
"""Facts of one rank, by check."""


def examine(config: Config | None, timeout_s: float) -> list[Row]:
    """Join the other ranks and run all checks. All ranks return the same rows, unless they could not join.

    Args: `timeout_s` limits the time in which one rank collects its facts. Other ranks wait twice as long for it, then
    report that it is lost.
    """
    try:
        ranks = join_ranks(2 * timeout_s + MARGIN_S)
    except (ValueError, RuntimeError) as error:
        context = Context(config, 1, _own_device())
        return _check([_collect(context, "none", timeout_s)], config, 1, _first_line(error))
    own = _collect(Context(config, ranks.world_size, ranks.device), ranks.engine.name, timeout_s)
    try:
        all_facts = ranks.all_gather_object(own)
        network_rows = _check_network(ranks, all_facts)
    except RuntimeError as error:
        if lost_ranks_message(error) is None:
            raise
        lost = f"then one rank was lost or stopped responding ({_first_line(error)})"
        return _check([own], config, ranks.world_size, lost)
    return [*_check(all_facts, config, ranks.world_size, ""), *network_rows]


def _collect(context: Context, engine: str, timeout_s: float) -> RankFacts:
    """Return the facts of this rank. Never raises, so that this rank reaches the collectives of the others."""
    config, deadline = context.config, Deadline(timeout_s)
    collectors = {
        "launch": partial(launch.collect_launch, context, engine),
        "device": partial(machine.collect_device, context),
        "machine": partial(machine.collect_machine, context),
        "versions": partial(launch.collect_versions, context),
        "disks": partial(machine.collect_disks, context),
    }
    if config is not None:
        for split, location in _splits(config).items():
            collectors[f"shards {split}"] = partial(inputs.collect_shards, context, location)
    # last, because only one rank of each machine does this, and all ranks should read shards at the same time
    collectors["model"] = partial(inputs.collect_model, context)
    return {name: deadline.run(collect) for name, collect in collectors.items()}


def _check(all_facts: list[RankFacts], config: Config | None, joined: int, not_joined: str) -> list[Row]:
    facts: dict[str, Facts] = {name: [own[name] for own in all_facts] for name in all_facts[0]}
    rows = [
        *launch.check_launch(facts["launch"], not_joined),
        *machine.check_device(facts["device"]),
        *machine.check_machine(facts["machine"]),
        *launch.check_versions(facts["versions"]),
        *inputs.check_model(facts["model"]),
        *machine.check_disks(facts["disks"], facts["model"], config),
    ]
    if config is not None:
        rows += [] if not_joined else inputs.check_batch(config, joined)
        for split in _splits(config):
            rows += inputs.check_shards(split, facts[f"shards {split}"], config, joined)
    return rows


def _check_network(ranks: Ranks, all_facts: list[RankFacts]) -> list[Row]:
    """Measure collectives, links and clocks. All ranks call this."""
    if ranks.world_size == 1:
        return []
    hosts = [own["launch"].get("host", "?") for own in all_facts]
    machine_ranks = [rank for rank, own in enumerate(all_facts) if own["launch"].get("local_rank", 0) == 0]
    ends = machine_ranks if len(machine_ranks) > 1 else list(range(ranks.world_size))
    gradient_bytes = inputs.gradient_bytes([own["model"] for own in all_facts])
    return [
        *network.check_network(network.measure_network(ranks, ends), hosts, gradient_bytes),
        *network.check_clocks(network.measure_clocks(ranks, machine_ranks), hosts),
    ]


def _splits(config: Config) -> dict[str, str]:
    return {"train": config.data.train} | ({} if config.data.val is None else {"val": config.data.val})


def _own_device() -> torch.device:
    """Return the device of a rank that has not joined."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
