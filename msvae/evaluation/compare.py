"""Comparison of training runs: settings, validation, evaluation and curves side by side in `compare.html`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table as ScreenTable

from msvae.files import replace_files
from msvae.report.charts import curves_figure
from msvae.report.page import Cell, Section, Table, write_page
from msvae.runs import METRICS, PANELS, RUN_CARD, VALIDATION, Curve, curve, rows_of

CONFIG = "config.yaml"
REPORTS = ("metrics.json", "report/metrics.json", "../metrics.json")
"""Paths from a run to a possible `metrics.json` of its evaluation. Quickstart writes the last one."""
VALIDATION_DIGEST = "manifest digest, val"
"""Key of a run card."""

VALIDATION_ROWS = (
    ("loss", "loss ↓", "{:.4f}"),
    ("psnr_db", "PSNR (dB) ↑", "{:.2f}"),
    ("angle_deg", "spectral angle (°) ↓", "{:.3f}"),
    ("ndvi_mae", "NDVI error ↓", "{:.4f}"),
    ("ndre_mae", "NDRE error ↓", "{:.4f}"),
    ("ssim", "SSIM ↑", "{:.3f}"),
)
EVALUATION_ROWS = (
    ("psnr_db", "PSNR (dB) ↑", "{:.2f}"),
    ("rmse", "RMSE ↓", "{:.4f}"),
    ("angle_deg", "spectral angle (°) ↓", "{:.2f}"),
    ("angle_p95_deg", "95th percentile of angles (°) ↓", "{:.2f}"),
    ("ssim", "SSIM ↑", "{:.3f}"),
    ("ndvi_mae", "NDVI error ↓", "{:.4f}"),
    ("cire_mae", "CIre error ↓", "{:.4f}"),
    ("mean_spectrum_rmse", "RMSE of mean spectra ↓", "{:.4f}"),
    ("bits_per_value", "bits per value", "{:.2f}"),
)
CAPTIONS = {
    "Settings that differ": "Settings in config.yaml that differ between runs, except the output folder.",
    "Validation": "Metrics on the validation split at the step with the lowest validation loss. The model of this "
    "step is saved in best/. The small print is the difference to the first run. ↑: higher is better. "
    "↓: lower is better.",
    "Evaluation": "Metrics that train/evaluate.py measured on the split in the first row. The small print is the 95 % "
    "confidence interval.",
    "Curves": "Training losses of neighbouring steps are averaged if there are many steps.",
}


@dataclass(frozen=True)
class Run:
    """The settings and results of one run folder."""

    name: str
    folder: Path
    config: dict[str, Any]
    """Values by full key, such as `optim.lr`."""
    card: dict[str, str]
    """Content of `run_card.json`; empty if the file does not exist."""
    steps: list[dict[str, Any]]
    """Rows of `metrics.jsonl`."""
    validation: list[dict[str, Any]]
    """Rows of `validation.jsonl`."""
    report: dict[str, Any] | None
    """`metrics.json` of the evaluation of the run, if there is one."""

    @property
    def best(self) -> dict[str, Any]:
        """Validation row with the lowest loss, whose weights are `best/`; empty if there is none."""
        rows = [row for row in self.validation if row["loss"] is not None]
        return min(rows, key=lambda row: float(row["loss"])) if rows else {}

    @property
    def last_step(self) -> int:
        """Last logged step."""
        return int(self.steps[-1]["step"]) if self.steps else 0


def compare(folders: Sequence[str], out: Path) -> None:
    """Write `compare.html` and print its tables.

    Raises: ValueError if a folder is not a run.
    """
    runs = read_runs(folders)
    differences = find_differences({run.name: run.config for run in runs})
    names = [run.name for run in runs]
    tables = {
        "Settings that differ": _settings_table(names, differences),
        "Validation": Table(["", *names], _validation_rows(runs)),
        "Evaluation": Table(["", *names], _evaluation_rows(runs)),
    }
    cautions = _cautions(runs, differences)
    with replace_files(out, last="compare.html") as new:
        write_page(
            new / "compare.html",
            title=f"Comparison of {len(runs)} runs",
            summary=_summary(runs),
            cautions=cautions,
            sections=[
                *(Section(name, CAPTIONS[name], table) for name, table in tables.items() if table.rows),
                Section("Curves", CAPTIONS["Curves"], curves_figure(_panels(runs)), "curves"),
            ],
            facts={run.name: str(run.folder) for run in runs},
            facts_heading="Folders of the runs",
        )
    _print(tables, cautions)
    Console(highlight=False, markup=False).print(f"page: {out / 'compare.html'}", soft_wrap=True)


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Read run folders and choose a distinct name for each run.

    Raises: ValueError if there are fewer than two folders, a folder is named twice, or a folder is not a run.
    """
    if url := next((folder for folder in folders if "://" in folder), None):
        raise ValueError(f"{url} is not a folder; copy the run from its store first")
    paths = [Path(folder) for folder in folders]
    resolved = [path.resolve() for path in paths]
    if len(paths) < 2:
        raise ValueError(f"got {len(paths)} run, expected two or more; name the folders that training wrote")
    if twice := next((path for path, full in zip(paths, resolved, strict=True) if resolved.count(full) > 1), None):
        raise ValueError(f"{twice} is named twice; name each run once")
    return [_read_run(path, name) for path, name in zip(paths, short_names(resolved), strict=True)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest distinct ends of the paths, without the last parts that all paths have in common."""
    parts = [path.parts for path in paths]
    while len({own[-1] for own in parts}) == 1 and all(len(own) > 1 for own in parts):
        parts = [own[:-1] for own in parts]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def find_differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the keys in which configurations differ, each with its value per run, None where a run lacks the key.

    `out` always differs and is left out.
    """
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    values = {key: {name: config.get(key) for name, config in configs.items()} for key in keys if key != "out"}
    return {key: by_run for key, by_run in values.items() if len({json.dumps(v) for v in by_run.values()}) > 1}


def _read_run(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; name a folder that training wrote")
    if missing := next((file for file in (CONFIG, METRICS) if not (folder / file).is_file()), None):
        raise ValueError(f"{folder} is not a run: it has no {missing}; pass the `out` of a training")
    card = folder / RUN_CARD
    return Run(
        name=name,
        folder=folder,
        config=_flatten(yaml.safe_load((folder / CONFIG).read_text())),
        card=json.loads(card.read_text()) if card.is_file() else {},
        steps=rows_of(folder / METRICS),
        validation=rows_of(folder / VALIDATION),
        report=_read_report(folder),
    )


def _read_report(folder: Path) -> dict[str, Any] | None:
    for path in (folder / relative for relative in REPORTS):
        metrics: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        # a report inside the run may have been moved with it; a report outside may belong to another run
        inside = path.resolve().is_relative_to(folder.resolve())
        if "judged" in metrics and (inside or Path(metrics["judged"]["model"]).parent == folder.resolve()):
            return metrics
    return None


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _settings_table(names: Sequence[str], differences: Mapping[str, Mapping[str, Any]]) -> Table:
    def text(value: Any) -> str:
        return str(value).lower() if isinstance(value, bool) else "–" if value is None else str(value)

    rows = [[Cell(key), *(Cell(text(by_run[name])) for name in names)] for key, by_run in differences.items()]
    return Table(["setting", *names], rows)


def _validation_rows(runs: Sequence[Run]) -> list[list[Cell]]:
    best = [run.best for run in runs]
    steps = [f"{row['step']:,} of {run.last_step:,}" if row else "–" for run, row in zip(runs, best, strict=True)]
    rows = [[Cell("step"), *map(Cell, steps)]]
    for key, label, form in VALIDATION_ROWS:
        first = best[0].get(key)
        rows.append([Cell(label), *(_cell(row.get(key), form, first if i else None) for i, row in enumerate(best))])
    speeds = [sorted(row["samples_per_s"] for row in run.steps if row.get("samples_per_s")) for run in runs]
    medians = [speed[len(speed) // 2] if speed else None for speed in speeds]
    return [*rows, [Cell("median training speed (tiles/s) ↑"), *(_cell(median, "{:.1f}") for median in medians)]]


def _evaluation_rows(runs: Sequence[Run]) -> list[list[Cell]]:
    if not any(run.report for run in runs):
        return []
    splits = [run.report["judged"]["split"] if run.report else "not evaluated" for run in runs]
    rows = [[Cell("split"), *map(Cell, splits)]]
    for key, label, form in EVALUATION_ROWS:
        rows.append([Cell(label), *(_interval_cell(run.report, key, form) for run in runs)])
    return rows


def _interval_cell(report: Mapping[str, Any] | None, key: str, form: str) -> Cell:
    """Return a metric of the model with its interval."""
    numbers = report["model"] if report else {}
    return Cell.with_interval(numbers.get(key), numbers.get("intervals", {}).get(key), form)


def _cell(value: float | None, form: str, first: float | None = None) -> Cell:
    """Return a number with its difference to the number of the first run, if that is given."""
    if value is None:
        return Cell("–")
    signed = form.replace(":", ":+")
    return Cell(form.format(value), "" if first is None else signed.format(value - first))


def _panels(runs: Sequence[Run]) -> dict[str, dict[str, Curve]]:
    """Return the curves of all runs by panel title and run."""
    curves = {"training loss": {run.name: curve(run.steps, "loss") for run in runs}}
    curves["validation loss"] = {run.name: curve(run.validation, "loss") for run in runs}
    curves |= {label: {run.name: curve(run.validation, key) for run in runs} for key, label in PANELS.items()}
    logged = {
        label: {name: own for name, own in by_run.items() if own is not None} for label, by_run in curves.items()
    }
    return {label: by_run for label, by_run in logged.items() if by_run}


def _summary(runs: Sequence[Run]) -> str:
    validated = [run for run in runs if run.best.get("psnr_db") is not None]
    if len(validated) < 2:
        return "Fewer than two of the runs have validation results, so the runs cannot be ranked."
    first, second = sorted(validated, key=lambda run: -run.best["psnr_db"])[:2]
    lead = first.best["psnr_db"] - second.best["psnr_db"]
    return (
        f"{first.name} has the highest leaf PSNR on its validation split: {first.best['psnr_db']:.2f} dB at step "
        f"{first.best['step']:,}, {lead:.2f} dB above {second.name}. Runs that differ only in their random seed "
        "have a different PSNR, too. Train each configuration with several seeds to see whether the lead is more than "
        "chance."
    )


def _cautions(runs: Sequence[Run], differences: Mapping[str, Any]) -> list[str]:
    """Return the reasons why numbers of the runs cannot be compared."""
    warnings = []
    if len({run.card[VALIDATION_DIGEST] for run in runs if VALIDATION_DIGEST in run.card}) > 1:
        warnings.append("The runs were validated on different tiles. Their validation metrics cannot be compared.")
    if len({run.report["judged"]["manifest_digest"] for run in runs if run.report}) > 1:
        warnings.append("The models were evaluated on different tiles. Their evaluations cannot be compared.")
    if any(key.startswith("loss.") for key in differences):
        warnings.append("The runs weight the loss terms differently. Compare PSNR, angle and indices, not the loss.")
    return warnings


def _print(tables: Mapping[str, Table], cautions: Sequence[str]) -> None:
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
