"""Parts that every check shares: rows of the table, facts of the ranks, the context of a rank, and its deadline.

A check has two functions. `collect_…` runs on every rank and returns facts about that rank. `check_…` receives the
facts of all ranks and returns rows.
"""

from __future__ import annotations

import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from msvae.config import Config

Level = Literal["ok", "warning", "fault"]
OwnFacts = dict[str, Any]
"""Facts that one check collected on this rank; `{"fault": TEXT}` if collecting failed."""
Facts = Sequence[Mapping[str, Any]]
"""Facts of one check on all ranks, in rank order."""

CREDENTIALS = re.compile(r"(://)[^/@\s]+@")
SIGNATURE = re.compile(r"(://[^\s?]+)\?[^\s;,)]+")
MIN_WAIT_S = 0.5
"""Time that a check may need if the deadline of the rank has passed already, in seconds."""


class Row(NamedTuple):
    """One row of the doctor's table. `advice` is empty if there is nothing to do."""

    name: str
    level: Level
    found: str
    advice: str = ""

    def without_secrets(self) -> Row:
        """Return the row without user names, passwords and signatures in its URLs."""
        found, advice = (SIGNATURE.sub(r"\1?…", CREDENTIALS.sub(r"\1…@", text)) for text in (self.found, self.advice))
        return self._replace(found=found, advice=advice)


@dataclass(frozen=True)
class Context:
    """Configuration, device and launcher variables of this rank.

    `joined` is the number of ranks that joined, 1 if they could not.
    """

    config: Config | None
    joined: int
    device: torch.device

    @property
    def rank(self) -> int:
        """Rank that the launcher assigned."""
        return int(os.environ.get("RANK", 0))

    @property
    def local_rank(self) -> int:
        """Rank among the ranks of this machine."""
        return int(os.environ.get("LOCAL_RANK", 0))

    @property
    def local_world_size(self) -> int:
        """Number of ranks that the launcher started on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", 1))

    @property
    def host(self) -> str:
        """Name of this machine."""
        return socket.gethostname()


class Deadline:
    """Time limit shared by all checks of a rank, so that the rank reaches the next collective in time."""

    def __init__(self, timeout_s: float) -> None:
        self._ends_at_s = time.monotonic() + timeout_s

    def run(self, collect: Callable[[], OwnFacts]) -> OwnFacts:
        """Return the facts from `collect`, or `{"fault": TEXT}` if it raises or does not return in time.

        `collect` may hang, for example on the disk of a server that is down.
        """
        answer: queue.SimpleQueue[OwnFacts] = queue.SimpleQueue()

        def put_answer() -> None:
            try:
                answer.put(collect())
            except Exception as error:  # a rank that fails here must still reach the collectives of the others
                answer.put({"fault": _one_line(error)})

        left_s = max(MIN_WAIT_S, self._ends_at_s - time.monotonic())
        # a daemon thread: a call that hangs in the kernel cannot be ended, and must not keep the process alive
        threading.Thread(target=put_answer, daemon=True).start()
        try:
            return answer.get(timeout=left_s)
        except queue.Empty:
            return {"fault": f"no answer within {left_s:.0f} s"}


def failed(name: str, facts: Facts, advice: str) -> Row | None:
    """Return a row with the first fault if collecting failed on some rank, else None."""
    ranks = [rank for rank, own in enumerate(facts) if "fault" in own]
    if not ranks:
        return None
    return Row(name, "fault", on_ranks(ranks, facts, facts[ranks[0]]["fault"]), advice)


def on_ranks(ranks: Sequence[int], facts: Facts, fault: str) -> str:
    """Return `on RANKS: FAULT`, or only the fault if there is a single rank."""
    return fault if len(facts) == 1 else f"on {list_ranks(ranks)}: {fault}"


def list_ranks(ranks: Sequence[int]) -> str:
    """Format ranks as `rank 3`, `ranks 0, 1, 2` or `ranks 0, 1, 2 and 5 more`."""
    shown = ", ".join(map(str, ranks[:3]))
    more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"


def value_range(values: Sequence[float], form: Callable[[float], str]) -> str:
    """Format one value per rank as `12 GB`, or as `3 GB (rank 1) to 12 GB (rank 0)` if ranks differ."""
    lowest, highest = min(values), max(values)
    if form(lowest) == form(highest):
        return form(lowest)
    return f"{form(lowest)} (rank {values.index(lowest)}) to {form(highest)} (rank {values.index(highest)})"


def size(num_bytes: float) -> str:
    """Format a number of bytes as `335 MB` or `1.3 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.{0 if num_bytes >= 1e2 * factor else 1}f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"


def duration(seconds: float) -> str:
    """Format a time as `12 us`, `3.4 ms` or `1.2 s`."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:,.1f} {unit}"
    return f"{seconds * 1e6:,.0f} us"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"
