"""How far the clocks of the machines are apart, from messages that go there and back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from msvae.distributed.collectives import Ranks
from msvae.doctor.row import Level, Row, duration

TRIES = 10
APART_S, FAR_APART_S = 1.0, 300.0
"""Where lines of two logs cannot be put in order; where object stores begin to refuse what was signed."""


class Skew(NamedTuple):
    """Of a rank's clock against that of rank 0: ahead by `ahead_s`, give or take `error_s`."""

    rank: int
    ahead_s: float
    error_s: float


def measure(ranks: Ranks, ends: Sequence[int]) -> list[Skew]:
    """Of one rank a machine, the same list on every rank. All ranks call it; the first end is rank 0."""
    found = []
    for peer in ends[1:]:
        if ranks.rank in (0, peer):
            asked = [_ask(ranks, peer if ranks.rank == 0 else 0) for _ in range(TRIES)]
            if ranks.rank == 0:
                found.append(estimate(peer, asked))
    return [Skew(*skew) for skew in ranks.broadcast_object(lambda: found)]


def estimate(rank: int, asked: Sequence[tuple[float, float, float]]) -> Skew:
    """From times of (asking, the peer's answer, getting it), the middle by the peer's clock.

    The answer was given at some time in between, so half of the shortest round trip bounds the error (Cristian 1989).
    """
    sent_s, answered_s, got_s = min(asked, key=lambda times: times[2] - times[0])
    return Skew(rank, answered_s - (sent_s + got_s) / 2, (got_s - sent_s) / 2)


def judge(skews: Sequence[Skew], hosts: Sequence[str]) -> list[Row]:
    """Nothing where there is one machine."""
    if not skews:
        return []
    worst = max(skews, key=lambda skew: abs(skew.ahead_s))
    least_s = max(0.0, abs(worst.ahead_s) - worst.error_s)
    direction = "ahead of" if worst.ahead_s > 0 else "behind"
    text = (
        f"{hosts[worst.rank]} (rank {worst.rank}) is {duration(abs(worst.ahead_s))} {direction} rank 0, "
        f"give or take {duration(worst.error_s)}"
    )
    if least_s > APART_S:
        level: Level = "fault" if least_s > FAR_APART_S else "warning"
        return [Row("clocks", level, text, "let NTP set the clocks (`timedatectl set-ntp true`)")]
    return [Row("clocks", "ok", f"within {duration(abs(worst.ahead_s) + worst.error_s)}; {text}")]


def _ask(ranks: Ranks, peer: int) -> tuple[float, float, float]:
    """On rank 0: when it asked, what the peer's clock then said, when that came."""
    clock = torch.zeros(1, dtype=torch.float64, device=ranks.device)
    sent_s = time.time()
    if ranks.rank == 0:
        ranks.send(clock, peer)
        ranks.recv(clock, peer)
    else:
        ranks.recv(clock, peer)
        # on a GPU, it has come only when it can be read
        float(clock)
        ranks.send(clock.fill_(time.time()), peer)
    return sent_s, float(clock), time.time()
