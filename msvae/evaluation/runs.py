"""What a run folder tells: how it was set, what it logged, and how its model was judged."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from msvae.runs import METRICS, RUN_CARD, VALIDATION, rows_of

CONFIG = "config.yaml"
REPORTS = ("metrics.json", "report/metrics.json", "../metrics.json")
"""Where an evaluation of the run may lie: the last is quickstart's."""


@dataclass(frozen=True)
class Run:
    """One run; `report` is `metrics.json` of its evaluation, where there is one."""

    name: str
    folder: Path
    config: dict[str, Any]
    """One value a key, such as `optim.lr`."""
    card: dict[str, str]
    steps: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    report: dict[str, Any] | None

    @property
    def best(self) -> dict[str, Any]:
        """The evaluation with the lowest loss, whose weights are `best/`; empty without any."""
        judged = [row for row in self.validation if row["loss"] is not None]
        return min(judged, key=lambda row: float(row["loss"])) if judged else {}


def read_runs(folders: Sequence[str]) -> list[Run]:
    """The runs in folders, each under a name of its own.

    Raises: ValueError when there are fewer than two, one stands twice, or one is no run.
    """
    if url := next((folder for folder in folders if "://" in folder), None):
        raise ValueError(f"{url} is no folder; copy the run from its store first")
    paths = [Path(folder) for folder in folders]
    places = [path.resolve() for path in paths]
    if len(paths) < 2:
        raise ValueError(f"got {len(paths)} run, expected two or more; name the folders that training wrote")
    if twice := next((path for path, place in zip(paths, places, strict=True) if places.count(place) > 1), None):
        raise ValueError(f"{twice} stands twice; name each run once")
    return [_read(path, name) for path, name in zip(paths, names_of(places), strict=True)]


def names_of(places: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, without the parts that all of them end with."""
    parts = [place.parts for place in places]
    while len({own[-1] for own in parts}) == 1 and all(len(own) > 1 for own in parts):
        parts = [own[:-1] for own in parts]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]


def differing(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each key in which the configurations of runs differ, its value by run; None where a run has none.

    `out` always differs and is left out.
    """
    keys = dict.fromkeys(key for config in configs.values() for key in config)
    values = {key: {name: config.get(key) for name, config in configs.items()} for key in keys if key != "out"}
    return {key: own for key, own in values.items() if len({json.dumps(value) for value in own.values()}) > 1}


def _read(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise ValueError(f"{folder} does not exist; name a folder that training wrote")
    if missing := next((file for file in (CONFIG, METRICS) if not (folder / file).is_file()), None):
        raise ValueError(f"{folder} is no run: it holds no {missing}; name the `out` of a training")
    card = folder / RUN_CARD
    return Run(
        name=name,
        folder=folder,
        config=_flat(yaml.safe_load((folder / CONFIG).read_text())),
        card=json.loads(card.read_text()) if card.is_file() else {},
        steps=rows_of(folder / METRICS),
        validation=rows_of(folder / VALIDATION),
        report=_report(folder),
    )


def _report(folder: Path) -> dict[str, Any] | None:
    for path in (folder / place for place in REPORTS):
        metrics: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        # one within the run may have been moved with it, one beside it may be of another run
        within = path.resolve().is_relative_to(folder.resolve())
        if "judged" in metrics and (within or Path(metrics["judged"]["model"]).parent == folder.resolve()):
            return metrics
    return None


def _flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return flat
