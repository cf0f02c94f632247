"""`msvae doctor`: check everything that a run needs on these machines, and print a table."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from msvae.cli.screen import say
from msvae.messages import counted

if TYPE_CHECKING:
    from msvae.doctor.row import Row

app = typer.Typer()

COLOURS = {"ok": "green", "warning": "yellow", "fault": "red"}
PRINTING_S = 5.0
"""Time that the other ranks wait before they end with a fault, so that the rank that prints can finish, in seconds."""


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def doctor(
    overrides: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(help="Configuration of the training run; `--section.key value` overrides may follow."),
    ] = None,
    timeout_s: Annotated[
        float,
        typer.Option(min=1, help="Seconds that a rank may need for its checks; a check without an answer is a fault."),
    ] = 60.0,
) -> None:
    """Check devices, ranks, network, clocks, disks and shards before a run. Exit code 1 if there is a fault.

    To check all ranks: accelerate launch --config_file FILE --module msvae doctor --config FILE.
    """
    # importing torch takes seconds, which other commands should not need
    from msvae.config import load_config
    from msvae.distributed.exit_codes import run_script
    from msvae.doctor.examine import examine

    def run() -> int:
        run_config = load_config(config, overrides.args) if config or overrides.args else None
        rows = [row.without_secrets() for row in examine(run_config, timeout_s)]
        faults = sum(row.level == "fault" for row in rows)
        if _prints(rows):
            show(rows)
        elif faults:
            # the launcher ends all ranks as soon as one has failed, also the rank that prints
            time.sleep(PRINTING_S)
        return 1 if faults else 0

    run_script(run)


def show(rows: Sequence[Row]) -> None:
    """Print a table on a terminal, else one line per row; then print the number of faults and warnings."""
    console = Console(highlight=False)
    if console.is_terminal:
        table = Table("check", "", "found", "what to do")
        for row in rows:
            table.add_row(Text(row.name), Text(row.level, COLOURS[row.level]), Text(row.found), Text(row.advice))
        console.print(table)
    else:
        for row in rows:
            say(f"{row.level:<7}  {row.name}: {row.found}{f'; {row.advice}' if row.advice else ''}")
    counts = [counted(sum(row.level == level for row in rows), level) for level in ("fault", "warning")]
    say(" and ".join(counts))


def _prints(rows: Sequence[Row]) -> bool:
    """Return True on rank 0, or on the first rank of each machine if the ranks did not join."""
    not_joined = any(row.name == "ranks" and row.level == "fault" for row in rows)
    return os.environ.get("LOCAL_RANK" if not_joined else "RANK", "0") == "0"
