"""Checks of the network: speed of collectives and of links between machines, and clocks of the machines.

All ranks call `measure_network` and `measure_clocks`, which return the same on every rank.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from msvae.distributed.collectives import Ranks
from msvae.doctor.row import Level, Row, duration, size

REPEATS = 5
MIN_BYTES, MAX_BYTES = 2**18, 2**27
WANTED_S = 0.2
"""Duration of a timed message, in seconds. The size of the message follows from a first, small message."""
MAX_ROUNDS = 15
"""Largest number of other machines with which a machine exchanges messages."""
SLOW_GBIT, SLOW_SHARE = 1.0, 0.5
"""A link is slow below this many Gbit/s, or below this share of the median link."""

CLOCK_TRIES = 10
LOG_SKEW_S, STORE_SKEW_S = 1.0, 300.0
"""Clock differences at which log lines cannot be ordered, and at which object stores begin to refuse requests."""


class Link(NamedTuple):
    """Speed between two ranks. With several machines, each rank represents its machine."""

    first: int
    second: int
    latency_s: float
    """One-way time of a few bytes, in seconds."""
    bytes_per_s: float
    """One-way speed of large messages."""


class Network(NamedTuple):
    """Measured speed of collectives and links."""

    latency_s: float
    """Time of an all-reduce of a few bytes, in seconds."""
    bus_bytes_per_s: float
    """Bus bandwidth of a large all-reduce: the bytes that each of p ranks must send, 2 (p - 1) / p of the message,
    divided by the time."""
    links: list[Link]


class Skew(NamedTuple):
    """Time by which the clock of a rank is ahead of the clock of rank 0, with an error of at most `error_s`."""

    rank: int
    ahead_s: float
    error_s: float


def measure_network(ranks: Ranks, ends: Sequence[int]) -> Network:
    """Time all-reduces of all ranks, and messages between every two of `ends`.

    Args: `ends` is one rank of each machine, or all ranks of a single machine.
    """
    small = torch.zeros(1, device=ranks.device)
    latency_s = _slowest(ranks, _median_s(ranks, lambda: ranks.all_reduce_sum(small), 4 * REPEATS))
    num_bytes = MIN_BYTES
    message = torch.zeros(num_bytes // 4, device=ranks.device)
    first_s = _slowest(ranks, _median_s(ranks, lambda: ranks.all_reduce_sum(message), 1))
    num_bytes = suitable_bytes(num_bytes, first_s)
    message = torch.zeros(num_bytes // 4, device=ranks.device)
    large_s = _slowest(ranks, _median_s(ranks, lambda: ranks.all_reduce_sum(message), REPEATS))
    sent = 2 * (ranks.world_size - 1) / ranks.world_size * num_bytes
    return Network(latency_s, sent / large_s, _measure_links(ranks, ends))


def pair_rounds(count: int) -> Iterator[list[tuple[int, int]]]:
    """Yield rounds of disjoint pairs, until each two of `count` numbers were paired (circle method)."""
    circle = [*range(count), *([-1] if count % 2 else [])]
    for _ in range(len(circle) - 1):
        pairs = zip(circle[: len(circle) // 2], reversed(circle[len(circle) // 2 :]), strict=True)
        yield [(min(pair), max(pair)) for pair in pairs if -1 not in pair]
        circle[1:] = [circle[-1], *circle[1:-1]]


def suitable_bytes(num_bytes: int, took_s: float) -> int:
    """Return a message size that needs about `WANTED_S` if `num_bytes` needed `took_s`; a multiple of four."""
    wanted = num_bytes * WANTED_S / max(took_s, 1e-9)
    return int(min(MAX_BYTES, max(MIN_BYTES, wanted))) // 4 * 4


def check_network(network: Network, hosts: Sequence[str], gradient_bytes: int) -> list[Row]:
    """Return the rows `collectives` and `links`.

    Args: `hosts` is the machine name of every rank; `gradient_bytes` is 0 if the model is unknown.
    """
    text = f"all-reduce {duration(network.latency_s)}, {_gbit(network.bus_bytes_per_s)} in each direction per rank"
    if gradient_bytes:
        ranks = len(hosts)
        sent = 2 * (ranks - 1) / ranks * gradient_bytes
        gradient_s = network.latency_s + sent / network.bus_bytes_per_s
        text += f": a gradient of {size(gradient_bytes)} in {duration(gradient_s)}"
    return [Row("collectives", "ok", text), *_check_links(network.links, hosts)]


def measure_clocks(ranks: Ranks, ends: Sequence[int]) -> list[Skew]:
    """Compare the clock of one rank of each machine with rank 0, which is the first of `ends`."""
    skews = []
    for peer in ends[1:]:
        if ranks.rank in (0, peer):
            exchanges = [_exchange_times(ranks, peer if ranks.rank == 0 else 0) for _ in range(CLOCK_TRIES)]
            if ranks.rank == 0:
                skews.append(estimate_skew(peer, exchanges))
    return [Skew(*skew) for skew in ranks.broadcast_object(lambda: skews)]


def estimate_skew(rank: int, exchanges: Sequence[tuple[float, float, float]]) -> Skew:
    """Estimate the skew of a rank from the times of request, reply and receipt of several exchanges.

    The clock of `rank` measures the time of the reply, and the clock of rank 0 the others. The reply was sent between
    request and receipt, so half of the shortest round trip is a bound of the error (Cristian 1989).
    """
    sent_s, replied_s, received_s = min(exchanges, key=lambda times: times[2] - times[0])
    return Skew(rank, replied_s - (sent_s + received_s) / 2, (received_s - sent_s) / 2)


def check_clocks(skews: Sequence[Skew], hosts: Sequence[str]) -> list[Row]:
    """Return the row `clocks`, or no row if there is one machine.

    Only a difference that exceeds its error is a warning or a fault.
    """
    if not skews:
        return []
    worst = max(skews, key=lambda skew: abs(skew.ahead_s))
    certain_s = max(0.0, abs(worst.ahead_s) - worst.error_s)
    direction = "ahead of" if worst.ahead_s > 0 else "behind"
    text = (
        f"{_named(worst.rank, hosts)} is {duration(abs(worst.ahead_s))} {direction} rank 0 "
        f"(± {duration(worst.error_s)})"
    )
    if certain_s > LOG_SKEW_S:
        level: Level = "fault" if certain_s > STORE_SKEW_S else "warning"
        return [Row("clocks", level, text, "synchronise the clocks with NTP (`timedatectl set-ntp true`)")]
    return [Row("clocks", "ok", f"within {duration(abs(worst.ahead_s) + worst.error_s)}; {text}")]


def _check_links(links: Sequence[Link], hosts: Sequence[str]) -> list[Row]:
    if not links:
        return []
    median = statistics.median(link.bytes_per_s for link in links)
    slow = [link for link in links if link.bytes_per_s < max(SLOW_SHARE * median, SLOW_GBIT * 1e9 / 8)]
    latency = duration(statistics.median(link.latency_s for link in links))
    text = f"{len(links):,} measured, median {_gbit(median)} and {latency}"
    if not slow:
        return [Row("links", "ok", text)]
    slow.sort(key=lambda link: link.bytes_per_s)
    shown = [f"{_named(one.first, hosts)} - {_named(one.second, hosts)} {_gbit(one.bytes_per_s)}" for one in slow[:3]]
    text += f"; slow: {', '.join(shown)}{f' and {len(slow) - 3} more' if len(slow) > 3 else ''}"
    advice = "check cables, switches and the interface in NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
    ends = [end for link in slow for end in link[:2]]
    worst = max(set(ends), key=ends.count)
    if 1 < len(slow) == ends.count(worst) < len(links):
        advice = f"all slow links end at {_named(worst, hosts)}: {advice}"
    return [Row("links", "warning", text, advice)]


def _measure_links(ranks: Ranks, ends: Sequence[int]) -> list[Link]:
    own: list[Link] = []
    for number, pairs in enumerate(pair_rounds(len(ends))):
        if number == MAX_ROUNDS:
            break
        for pair in pairs:
            first, second = (ends[at] for at in pair)
            if ranks.rank in (first, second):
                link = _measure_link(ranks, first, second)
                if ranks.rank == first:
                    own.append(link)
        # a pair that has finished must not disturb the others with its next round
        ranks.barrier()
    return [Link(*link) for links in ranks.all_gather_object(own) for link in links]


def _measure_link(ranks: Ranks, first: int, second: int) -> Link:
    """Time messages in both directions. Both ends call this; the first end chooses the size of the messages."""
    peer = second if ranks.rank == first else first

    def round_trip(message: Tensor) -> Callable[[], None]:
        return lambda: _there_and_back(ranks, message, peer)

    small = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    latency_s = _median_s(ranks, round_trip(small), 4 * REPEATS, together=False) / 2
    message = torch.zeros(MIN_BYTES // 4, device=ranks.device)
    first_s = _median_s(ranks, round_trip(message), 1, together=False)
    small.fill_(suitable_bytes(MIN_BYTES, first_s / 2))
    _there_and_back(ranks, small, peer)
    num_bytes = int(small)
    message = torch.zeros(num_bytes // 4, device=ranks.device)
    large_s = _median_s(ranks, round_trip(message), REPEATS, together=False) / 2
    return Link(first, second, latency_s, num_bytes / large_s)


def _there_and_back(ranks: Ranks, message: Tensor, peer: int) -> None:
    """Send `message` from the lower rank to the higher one and back, in place."""
    for act in (ranks.send, ranks.recv) if ranks.rank < peer else (ranks.recv, ranks.send):
        act(message, peer)


def _exchange_times(ranks: Ranks, peer: int) -> tuple[float, float, float]:
    """Return the times of request, reply and receipt. They are meaningful on rank 0."""
    clock = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    sent_s = time.time()
    if ranks.rank == 0:
        ranks.send(clock, peer)
        ranks.recv(clock, peer)
    else:
        ranks.recv(clock, peer)
        # a GPU has received the message only when it can be read
        float(clock)
        ranks.send(clock.fill_(time.time()), peer)
    return sent_s, float(clock), time.time()


def _median_s(ranks: Ranks, act: Callable[[], None], repeats: int, together: bool = True) -> float:
    """Return the median time until the device has finished `act`. The first call, which connects, is not counted."""
    times_s = []
    for repeat in range(repeats + 1):
        if together:
            ranks.barrier()
        _synchronise(ranks.device)
        began_s = time.perf_counter()
        act()
        _synchronise(ranks.device)
        if repeat:
            times_s.append(time.perf_counter() - began_s)
    return statistics.median(times_s)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(ranks: Ranks, seconds: float) -> float:
    """Return the longest time of all ranks."""
    return max(float(value) for value in ranks.all_gather_object(seconds))


def _gbit(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8e-9:,.3g} Gbit/s"


def _named(rank: int, hosts: Sequence[str]) -> str:
    return f"{hosts[rank]} (rank {rank})"
