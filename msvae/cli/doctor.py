"""`msvae doctor`: a table of what a run would meet on these machines."""

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
OTHERS_WAIT_S = 5.0


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def doctor(
    overrides: typer.Context,
    config: Annotated[Path | None, typer.Option(help="Of the training run; `--section.key value` may follow.")] = None,
    timeout_s: Annotated[float, typer.Option(min=1, help="How long anything may take before it is a fault.")] = 60.0,
) -> None:
    """Look at devices, ranks, network, clocks, disks and shards before a run. Exit code 1 when there is a fault.

    Alone, or on all ranks: accelerate launch --config_file FILE --module msvae doctor --config FILE.
    """
    # torch takes seconds, which no other command should have to wait
    from msvae.config import load_config
    from msvae.distributed.setup import run_script
    from msvae.doctor.examine import examine

    def run() -> int:
        asked = load_config(config, overrides.args) if config or overrides.args else None
        rows = [row.without_secrets() for row in examine(asked, timeout_s)]
        faults = sum(row.level == "fault" for row in rows)
        if _speaks(rows):
            show(rows)
        elif faults:
            # the launcher ends all ranks when one has failed, also the one that speaks
            time.sleep(OTHERS_WAIT_S)
        return 1 if faults else 0

    run_script(run)


def show(rows: Sequence[Row]) -> None:
    """A table on a terminal, else a line a row; then how many faults and warnings there are."""
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


def _speaks(rows: Sequence[Row]) -> bool:
    """Rank 0; of ranks that never met, the first of each machine."""
    apart = any(row.name == "ranks" and row.level == "fault" for row in rows)
    return os.environ.get("LOCAL_RANK" if apart else "RANK", "0") == "0"
