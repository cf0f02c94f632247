"""Collectives between all ranks, and the link between every two machines, measured. All ranks call `measure`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msvae.distributed.collectives import Ranks
from msvae.doctor.row import Row, duration, size

REPEATS = 5
FIRST_BYTES, MOST_BYTES = 2**18, 2**27
WANTED_S = 0.2
"""How long a message should travel to be timed well; its size follows from a first, small one."""
MOST_ROUNDS = 15
"""In each of which every machine meets another one."""
SLOW_GBIT, SLOW_SHARE = 1.0, 0.5
"""What no network for training should be under, and what share of the median link."""


class Link(NamedTuple):
    """Between two ranks, which stand for their machines where there are several."""

    first: int
    second: int
    latency_s: float
    """Of a few bytes, one way."""
    bytes_a_s: float
    """Of large messages, one way."""


class Network(NamedTuple):
    """The same on every rank."""

    latency_s: float
    """Of an all-reduce of a few bytes."""
    bus_bytes_a_s: float
    """Of a large all-reduce: 2 (p - 1) / p of its bytes, which each rank must send, over its time."""
    links: list[Link]


def measure(ranks: Ranks, ends: Sequence[int]) -> Network:
    """Args: ranks between which links are measured, one a machine, or all of a single machine."""
    small = torch.zeros(1, device=ranks.device)
    latency_s = _of_all(ranks, _median_s(ranks, lambda: ranks.all_reduce_sum(small), 4 * REPEATS))
    num_bytes = FIRST_BYTES
    message = torch.zeros(num_bytes // 4, device=ranks.device)
    first_s = _of_all(ranks, _median_s(ranks, lambda: ranks.all_reduce_sum(message), 1))
    num_bytes = suitable_bytes(num_bytes, first_s)
    message = torch.zeros(num_bytes // 4, device=ranks.device)
    large_s = _of_all(ranks, _median_s(ranks, lambda: ranks.all_reduce_sum(message), REPEATS))
    sent = 2 * (ranks.world_size - 1) / ranks.world_size * num_bytes
    return Network(latency_s, sent / large_s, _links(ranks, ends))


def rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Disjoint pairs, round after round, until every two of `count` have met: the circle method."""
    places = [*range(count), *([-1] if count % 2 else [])]
    for _ in range(len(places) - 1):
        pairs = zip(places[: len(places) // 2], reversed(places[len(places) // 2 :]), strict=True)
        yield [(min(pair), max(pair)) for pair in pairs if -1 not in pair]
        places[1:] = [places[-1], *places[1:-1]]


def suitable_bytes(num_bytes: int, took_s: float) -> int:
    """A size that takes about `WANTED_S`, when `num_bytes` took `took_s`; a multiple of four."""
    wanted = num_bytes * WANTED_S / max(took_s, 1e-9)
    return int(min(MOST_BYTES, max(FIRST_BYTES, wanted))) // 4 * 4


def judge(network: Network, hosts: Sequence[str], gradient_bytes: int) -> list[Row]:
    """Args: the machine of every rank, by its name."""
    text = f"all-reduce {duration(network.latency_s)}, {_gbit(network.bus_bytes_a_s)} each way and rank"
    if gradient_bytes:
        ranks = len(hosts)
        sent = 2 * (ranks - 1) / ranks * gradient_bytes
        takes_s = network.latency_s + sent / network.bus_bytes_a_s
        text += f": a gradient of {size(gradient_bytes)} in {duration(takes_s)}"
    return [Row("collectives", "ok", text), *_judge_links(network.links, hosts)]


def _judge_links(links: Sequence[Link], hosts: Sequence[str]) -> list[Row]:
    if not links:
        return []
    speeds = [link.bytes_a_s for link in links]
    median = statistics.median(speeds)
    slow = [link for link in links if link.bytes_a_s < max(SLOW_SHARE * median, SLOW_GBIT * 1e9 / 8)]
    latency = duration(statistics.median(link.latency_s for link in links))
    text = f"{len(links):,} measured, {_gbit(median)} and {latency} at the median"
    if not slow:
        return [Row("links", "ok", text)]
    slow.sort(key=lambda link: link.bytes_a_s)
    shown = [f"{_named(one.first, hosts)} - {_named(one.second, hosts)} {_gbit(one.bytes_a_s)}" for one in slow[:3]]
    text += f"; slow: {', '.join(shown)}{f' and {len(slow) - 3} more' if len(slow) > 3 else ''}"
    advice = "look at cables, switches and the interface that NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME names"
    ends = [end for link in slow for end in link[:2]]
    worst = max(set(ends), key=ends.count)
    if 1 < len(slow) == ends.count(worst) < len(links):
        advice = f"all of them lead to {_named(worst, hosts)}: {advice}"
    return [Row("links", "warning", text, advice)]


def _links(ranks: Ranks, ends: Sequence[int]) -> list[Link]:
    own: list[Link] = []
    for number, pairs in enumerate(rounds(len(ends))):
        if number == MOST_ROUNDS:
            break
        for pair in pairs:
            first, second = (ends[at] for at in pair)
            if ranks.rank in (first, second):
                link = _link(ranks, first, second)
                if ranks.rank == first:
                    own.append(link)
        # a pair that is through would disturb those that are not, if it went on
        ranks.barrier()
    return [Link(*link) for links in ranks.all_gather_object(own) for link in links]


def _link(ranks: Ranks, first: int, second: int) -> Link:
    """Both ends: the first one measures and says how large the messages are."""
    peer = second if ranks.rank == first else first

    def travel(message: Tensor) -> Callable[[], None]:
        return lambda: _there_and_back(ranks, message, peer)

    small = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    latency_s = _median_s(ranks, travel(small), 4 * REPEATS, together=False) / 2
    message = torch.zeros(FIRST_BYTES // 4, device=ranks.device)
    first_s = _median_s(ranks, travel(message), 1, together=False)
    small.fill_(suitable_bytes(FIRST_BYTES, first_s / 2))
    _there_and_back(ranks, small, peer)
    num_bytes = int(small)
    message = torch.zeros(num_bytes // 4, device=ranks.device)
    large_s = _median_s(ranks, travel(message), REPEATS, together=False) / 2
    return Link(first, second, latency_s, num_bytes / large_s)


def _there_and_back(ranks: Ranks, message: Tensor, peer: int) -> None:
    """From the lower rank to the higher one and back, in place."""
    for act in (ranks.send, ranks.recv) if ranks.rank < peer else (ranks.recv, ranks.send):
        act(message, peer)


def _median_s(ranks: Ranks, act: Callable[[], None], repeats: int, together: bool = True) -> float:
    """Of an act that ends on the device; the first, which connects, is not counted."""
    times_s = []
    for repeat in range(repeats + 1):
        if together:
            ranks.barrier()
        _settle(ranks.device)
        began_s = time.perf_counter()
        act()
        _settle(ranks.device)
        if repeat:
            times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _of_all(ranks: Ranks, seconds: float) -> float:
    """The same on every rank: of the one for which it took longest."""
    return max(float(value) for value in ranks.all_gather_object(seconds))


def _gbit(bytes_a_s: float) -> str:
    return f"{bytes_a_s * 8e-9:,.3g} Gbit/s"


def _named(rank: int, hosts: Sequence[str]) -> str:
    return f"{hosts[rank]} (rank {rank})"
