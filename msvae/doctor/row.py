"""A row of the doctor's table: what was looked at, how it is, what was found and what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

Level = Literal["ok", "warning", "fault"]
Facts = Sequence[Mapping[str, Any]]
"""What each rank found in one check, in rank order; `{"fault": TEXT}` where the check itself failed."""

CREDENTIALS = re.compile(r"(://)[^/@\s]+@")
SIGNATURE = re.compile(r"(://[^\s?]+)\?[^\s;,)]+")


class Row(NamedTuple):
    """`advice` is empty where there is nothing to do."""

    name: str
    level: Level
    found: str
    advice: str = ""

    def without_secrets(self) -> Row:
        """User names, passwords and signatures of URLs left out."""
        found, advice = (SIGNATURE.sub(r"\1?…", CREDENTIALS.sub(r"\1…@", text)) for text in (self.found, self.advice))
        return self._replace(found=found, advice=advice)


def failed(name: str, facts: Facts, advice: str) -> Row | None:
    """The row of a check that failed on some rank: the first of them speaks."""
    ranks = [rank for rank, found in enumerate(facts) if "fault" in found]
    if not ranks:
        return None
    return Row(name, "fault", told_of(ranks, facts, facts[ranks[0]]["fault"]), advice)


def told_of(ranks: Sequence[int], facts: Facts, fault: str) -> str:
    """A fault of the first of these ranks, and which others have one; of a rank that is alone, the fault."""
    return fault if len(facts) == 1 else f"on {listed(ranks)}: {fault}"


def listed(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 1, 2`, `ranks 0, 1, 2 and 5 more`."""
    shown = ", ".join(map(str, ranks[:3]))
    more = f" and {len(ranks) - 3} more" if len(ranks) > 3 else ""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"


def extent(values: Sequence[float], form: Callable[[float], str]) -> str:
    """`12 GB`, or of ranks that differ `3 GB (rank 1) to 12 GB (rank 0)`."""
    least, most = min(values), max(values)
    if form(least) == form(most):
        return form(least)
    return f"{form(least)} (rank {values.index(least)}) to {form(most)} (rank {values.index(most)})"


def size(num_bytes: float) -> str:
    """`335 MB`, `1.3 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.{0 if num_bytes >= 1e2 * factor else 1}f} {unit}"
    return f"{num_bytes / 1e3:,.1f} kB"


def duration(seconds: float) -> str:
    """`12 us`, `3.4 ms`, `1.2 s`."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= factor:
            return f"{seconds / factor:,.1f} {unit}"
    return f"{seconds * 1e6:,.0f} us"
