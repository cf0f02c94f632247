"""Several runs side by side: how they were set, how they went, how their models were judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as ScreenTable

from msvae.evaluation.runs import Run, differing, read_runs
from msvae.files import replace_files
from msvae.report.charts import curves_figure
from msvae.report.page import Cell, Section, Table, write_report
from msvae.runs import PANELS, Line, line

VALIDATION_ROWS = (
    ("loss", "loss ↓", "{:.4f}"),
    ("psnr_db", "PSNR (dB) ↑", "{:.2f}"),
    ("angle_deg", "angle (°) ↓", "{:.3f}"),
    ("ndvi_mae", "NDVI error ↓", "{:.4f}"),
    ("ndre_mae", "NDRE error ↓", "{:.4f}"),
    ("ssim", "SSIM ↑", "{:.3f}"),
)
JUDGED_ROWS = (
    ("psnr_db", "PSNR (dB) ↑", "{:.2f}"),
    ("rmse", "RMSE ↓", "{:.4f}"),
    ("angle_deg", "angle (°) ↓", "{:.2f}"),
    ("angle_p95_deg", "its 95th percentile (°) ↓", "{:.2f}"),
    ("ssim", "SSIM ↑", "{:.3f}"),
    ("ndvi_mae", "NDVI error ↓", "{:.4f}"),
    ("cire_mae", "CIre error ↓", "{:.4f}"),
    ("mean_spectrum_rmse", "mean spectrum ↓", "{:.4f}"),
    ("bits_per_value", "bits a value", "{:.2f}"),
)

VALIDATED = "manifest digest, val"
"""In a run card."""
CAPTIONS = {
    "Settings that differ": "Of config.yaml, out left aside.",
    "Validation": "On the validation split while training, at the evaluation with the lowest loss, whose weights are "
    "best/. Small: less the first run.",
    "Evaluation": "What train/evaluate.py found, on the split that it judged. Small: 95 % interval.",
    "Curves": "Training losses are means over neighbouring steps where there are many.",
}


def compare(folders: Sequence[str], out: Path) -> None:
    """Write `compare.html` and show its tables on the screen.

    Raises: ValueError when a folder is no run.
    """
    runs = read_runs(folders)
    differences = differing({run.name: run.config for run in runs})
    tables = {
        "Settings that differ": _settings_table(runs, differences),
        "Validation": _table(runs, _validation_rows(runs)),
        "Evaluation": _table(runs, _judged_rows(runs)),
    }
    cautions = _cautions(runs, differences)
    with replace_files(out, last="compare.html") as new:
        write_report(
            new / "compare.html",
            title=f"{len(runs)} runs side by side",
            verdict=_verdict(runs),
            cautions=cautions,
            sections=[
                *(Section(name, CAPTIONS[name], table) for name, table in tables.items() if table.rows),
                Section("Curves", CAPTIONS["Curves"], curves_figure(_panels(runs)), "curves"),
            ],
            facts={run.name: str(run.folder) for run in runs},
            facts_heading="Runs",
        )
    _show(tables, cautions)
    Console(highlight=False, markup=False).print(f"page: {out / 'compare.html'}", soft_wrap=True)


def _validation_rows(runs: Sequence[Run]) -> list[list[Cell]]:
    best = [run.best for run in runs]
    steps = [f"{row['step']:,} of {_last_step(run):,}" if row else "–" for run, row in zip(runs, best, strict=True)]
    rows = [[Cell("step"), *map(Cell, steps)]]
    for key, label, form in VALIDATION_ROWS:
        first = best[0].get(key)
        rows.append([Cell(label), *(_number(row.get(key), form, first if i else None) for i, row in enumerate(best))])
    speeds = [sorted(row["samples_per_s"] for row in run.steps if row.get("samples_per_s")) for run in runs]
    medians = [speed[len(speed) // 2] if speed else None for speed in speeds]
    return [*rows, [Cell("tiles/s in training, median"), *(_number(median, "{:.1f}") for median in medians)]]


def _judged_rows(runs: Sequence[Run]) -> list[list[Cell]]:
    if not any(run.report for run in runs):
        return []
    splits = [run.report["judged"]["split"] if run.report else "not evaluated" for run in runs]
    rows = [[Cell("split"), *map(Cell, splits)]]
    for key, label, form in JUDGED_ROWS:
        rows.append([Cell(label), *(_judged_cell(run.report, key, form) for run in runs)])
    return rows


def _judged_cell(report: Mapping[str, Any] | None, key: str, form: str) -> Cell:
    numbers = report["model"] if report else {}
    ends = numbers.get("intervals", {}).get(key)
    value = _number(numbers.get(key), form)
    return Cell(value.text, " to ".join(form.format(end) for end in ends)) if ends and None not in ends else value


def _number(value: float | None, form: str, first: float | None = None) -> Cell:
    if value is None:
        return Cell("–")
    signed = form.replace(":", ":+")
    return Cell(form.format(value), "" if first is None else signed.format(value - first))


def _settings_table(runs: Sequence[Run], differences: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [[Cell(key), *(Cell(_setting(own[run.name])) for run in runs)] for key, own in differences.items()]
    return Table(["setting", *(run.name for run in runs)], rows)


def _setting(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "–" if value is None else str(value)


def _table(runs: Sequence[Run], rows: Sequence[Sequence[Cell]]) -> Table:
    return Table(["", *(run.name for run in runs)], rows)


def _panels(runs: Sequence[Run]) -> dict[str, dict[str, Line]]:
    lines = {"training loss": {run.name: line(run.steps, "loss") for run in runs}}
    lines["validation loss"] = {run.name: line(run.validation, "loss") for run in runs}
    lines |= {label: {run.name: line(run.validation, key) for run in runs} for key, label in PANELS.items()}
    found = {label: {name: own for name, own in by_run.items() if own is not None} for label, by_run in lines.items()}
    return {label: by_run for label, by_run in found.items() if by_run}


def _verdict(runs: Sequence[Run]) -> str:
    judged = sorted((run for run in runs if run.best.get("psnr_db") is not None), key=lambda run: -run.best["psnr_db"])
    if len(judged) < 2:
        return "Fewer than two of the runs were validated while training, so none can be called better."
    first, second = judged[:2]
    lead = first.best["psnr_db"] - second.best["psnr_db"]
    return (
        f"{first.name} reaches the highest leaf PSNR on its validation split, {first.best['psnr_db']:.2f} dB at step "
        f"{first.best['step']:,}, {lead:.2f} dB above {second.name}. Runs differ from seed to seed: only more seeds "
        "can tell whether that is more than chance."
    )


def _cautions(runs: Sequence[Run], differences: Mapping[str, Any]) -> list[str]:
    found = []
    validated = {run.card[VALIDATED] for run in runs if VALIDATED in run.card}
    if len(validated) > 1:
        found.append("The runs were validated on different tiles: their validation numbers cannot be compared.")
    judged = {run.report["judged"]["manifest_digest"] for run in runs if run.report}
    if len(judged) > 1:
        found.append("The models were evaluated on different tiles: their evaluations cannot be compared.")
    if any(key.startswith("loss.") for key in differences):
        found.append("Losses weigh their terms differently: compare PSNR, angle and indices, not the loss.")
    return found


def _last_step(run: Run) -> int:
    return int(run.steps[-1]["step"]) if run.steps else 0


def _show(tables: Mapping[str, Table], cautions: Sequence[str]) -> None:
    console = Console(highlight=False, markup=False)
    for name, table in tables.items():
        if table.rows:
            shown = ScreenTable(title=name, title_justify="left")
            for i, heading in enumerate(table.headings):
                shown.add_column(heading, justify="right" if i else "left", overflow="fold")
            for row in table.rows:
                shown.add_row(*(f"{cell.text}\n{cell.small}" if cell.small else cell.text for cell in row))
            console.print(shown)
    for caution in cautions:
        console.print(f"caution: {caution}", soft_wrap=True)
