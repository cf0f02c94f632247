"""Judging a saved model: numbers beside those of the baselines, and the report."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from msvae.engine.evaluation import Evaluator, Reconstruct, by_model
from msvae.engine.logging import VALIDATION, whole_lines
from msvae.engine.ranks import Ranks
from msvae.metrics.accumulate import Summary, TileSums, summarise, tile_rmse
from msvae.metrics.baselines import mean_spectrum, principal_components
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.report.page import Row, Section, write_report
from msvae.report.pictures import comparison_figure, curves_figure, spectra_figure
from msvae.shards.manifest import MANIFEST_NAME
from msvae.shards.reader import ShardReader
from msvae.shards.store import MissingError, open_store
from msvae.wording import counted

BATCH_SIZE = 8
FEW_TILES = 10
EXPLANATIONS = {
    "model": "this model",
    "untrained": "the same before its first step",
    "pca3": "each spectrum through 3 principal components, no spatial compression",
    "mean_spectrum": "the mean leaf spectrum everywhere",
}


def evaluate(model_folder: Path, data: str, out: Path, ranks: Ranks) -> None:
    """Judge a model and its baselines on a split; the main process writes `metrics.json` and `report.html`.

    Args: folder of a saved model, its untrained state being `../untrained`; a split, or a data set whose `test` (else
        `val`) split is taken; folder to write to.
    Raises: ValueError when a folder is missing or the split has other bands than the model.
    """
    split = choose_split(data)
    evaluator = Evaluator(ShardReader(split), ranks, BATCH_SIZE, num_workers=1)
    model = load_for(model_folder, evaluator, ranks)
    untrained = load_for(untrained_folder(model_folder), evaluator, ranks)
    statistics = evaluator.reader.manifest.statistics
    reconstructions: dict[str, Reconstruct] = {
        "model": by_model(model),
        "untrained": by_model(untrained),
        "pca3": lambda batch: principal_components(batch.tiles, statistics.mean, statistics.covariance),
        "mean_spectrum": lambda batch: mean_spectrum(batch.tiles, statistics.mean),
    }
    say = _announcer(ranks)
    sums = {}
    for name, reconstruct in reconstructions.items():
        say(f"judging {name} on {split}: {counted(evaluator.reader.manifest.num_samples, 'tile')}")
        sums[name] = evaluator.tile_sums(reconstruct)
    if ranks.is_main:
        summaries = {name: summarise(columns, evaluator.bands) for name, columns in sums.items()}
        out.mkdir(parents=True, exist_ok=True)
        _write_metrics(out, summaries)
        _write_report(out, model_folder, split, evaluator, reconstructions["model"], sums["model"], summaries)
        _print_verdict(out, summaries)
    ranks.wait()


def choose_split(data: str) -> str:
    """`data`, a folder or URL, when it is a split, else its `test` or `val` split.

    Raises: ValueError when it is neither.
    """
    for split in (data, f"{data}/test", f"{data}/val"):
        with suppress(MissingError):
            open_store(split).size_bytes(MANIFEST_NAME)
            return split
    raise ValueError(f"{data} is neither a split nor holds test/ or val/; make shards with `msvae pack`")


def untrained_folder(model_folder: Path) -> Path:
    """Where training left the model as it was before its first step.

    Raises: ValueError when it is not there.
    """
    folder = model_folder.resolve().parent / "untrained"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is missing: the untrained model that training saves beside model/; copy it there")
    return folder


def load_for(folder: Path, evaluator: Evaluator, ranks: Ranks) -> AutoencoderKLMultispectralAdapter:
    """A saved model on this rank's device.

    Raises: ValueError when it is no model of ours or its bands are not those of the split.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no model; name a folder that training saved, such as RUN/model or RUN/best")
    model = AutoencoderKLMultispectralAdapter.from_pretrained(folder)
    if model.bands.wavelengths_nm != evaluator.bands.wavelengths_nm:
        raise ValueError(
            f"{evaluator.reader.store.location} holds {evaluator.bands}, {folder} expects {model.bands}; "
            "repack with --wavelengths, or use the model trained on these bands"
        )
    return model.to(ranks.device)  # type: ignore[no-any-return]


def _write_metrics(out: Path, summaries: dict[str, Summary]) -> None:
    numbers = {name: asdict(summary) for name, summary in summaries.items()}
    metrics = {"model": numbers.pop("model"), "baselines": numbers}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


def _write_report(
    out: Path,
    model_folder: Path,
    split: str,
    evaluator: Evaluator,
    reconstruct: Reconstruct,
    sums: TileSums,
    summaries: dict[str, Summary],
) -> None:
    manifest = evaluator.reader.manifest
    rmse = tile_rmse(sums, evaluator.bands)
    with_leaf = np.flatnonzero(sums["num_pixels"])
    by_error = with_leaf[np.argsort(rmse[with_leaf])]
    slots = [int(by_error[i]) for i in dict.fromkeys((0, len(by_error) // 2, len(by_error) - 1))]
    examples = evaluator.examples(reconstruct, slots)
    sections = [
        Section(
            "Best, median and worst tile",
            "From the top: the tile with the smallest, the median and the largest error. Outside the leaf mask "
            "nothing is learned or judged, so reconstructions are shown on the leaf alone.",
            comparison_figure(examples, evaluator.bands),
            "tiles",
        ),
        Section(
            "Leaf spectra",
            "Leaf pixels of the tiles above. The lines should lie on each other, and so should the shaded spreads.",
            spectra_figure(examples, evaluator.bands),
            "spectra",
        ),
        *_training_curves(model_folder.resolve().parent / VALIDATION),
    ]
    write_report(
        out / "report.html",
        title="Leaf reconstruction report",
        verdict=f"{verdict(summaries)} {_caution(split, manifest.num_samples)}",
        rows=[Row(name.replace("_", " "), EXPLANATIONS[name], asdict(s)) for name, s in summaries.items()],
        band_labels=[f"{nm:.0f} nm" for nm in evaluator.bands.wavelengths_nm],
        sections=sections,
        facts={
            "model": str(model_folder),
            "split": f"{split}: {counted(manifest.num_samples, 'tile')} of {manifest.tile_px} px, "
            f"{counted(summaries['model'].num_leaf_pixels, 'leaf pixel')}",
            "bands": ", ".join(
                f"{n} {nm:.0f} nm" for n, nm in zip(manifest.band_names, manifest.wavelengths_nm, strict=True)
            ),
            "manifest": manifest.digest(),
            "versions": ", ".join(
                f"{lib} {importlib.metadata.version(lib)}" for lib in ("msvae", "torch", "diffusers")
            ),
        },
    )


def verdict(summaries: dict[str, Summary]) -> str:
    """What the numbers say, in three sentences."""
    model, untrained, mean, pca = (summaries[name] for name in ("model", "untrained", "mean_spectrum", "pca3"))
    gain_db = model.psnr_db - untrained.psnr_db
    beats_mean = "better" if model.psnr_db > mean.psnr_db else "no better"
    versus_pca = "above" if model.psnr_db > pca.psnr_db else "below"
    return (
        f"Leaf reconstructions reach {model.psnr_db:.2f} dB PSNR and a spectral angle of {_degrees(model)}, "
        f"{'up' if gain_db > 0 else 'down'} {abs(gain_db):.2f} dB from the untrained model ({_degrees(untrained)}). "
        f"That is {beats_mean} than the mean leaf spectrum everywhere ({mean.psnr_db:.2f} dB, {_degrees(mean)}), "
        f"so the model {'has' if beats_mean == 'better' else 'has not'} learned to tell leaf tissues apart. "
        f"It is {versus_pca} three principal components of every pixel ({pca.psnr_db:.2f} dB, {_degrees(pca)}), which "
        "keep full spatial detail at many times the size."
    )


def _caution(split: str, num_tiles: int) -> str:
    if Path(split).name == "train":
        return "The model was trained on these very tiles: on leaves it has not seen it will do worse."
    judged = f"{counted(num_tiles, 'tile')} {'was' if num_tiles == 1 else 'were'} judged"
    return f"Only {judged}, so the numbers are rough." if num_tiles < FEW_TILES else ""


def _training_curves(path: Path) -> list[Section]:
    rows: list[dict[str, Any]] = [json.loads(line) for line in whole_lines(path)] if path.is_file() else []
    if not rows:
        return []
    names = {"psnr_db": "leaf PSNR (dB)", "angle_deg": "spectral angle (°)", "ndvi_mae": "NDVI error"}
    curves = {label: [row[n] for row in rows] for n, label in names.items() if all(row[n] is not None for row in rows)}
    figure = curves_figure([row["step"] for row in rows], curves)
    caption = (
        "On the validation split while training. Curves that still improve ask for more steps, those that turn for "
        "more images."
    )
    return [Section("Training", caption, figure, "training")]


def _degrees(summary: Summary) -> str:
    return "no angle" if summary.angle_deg is None else f"{summary.angle_deg:.2f}°"


def _announcer(ranks: Ranks) -> Callable[[str], None]:
    console = Console(highlight=False)
    return lambda line: console.print(line, soft_wrap=True) if ranks.is_main else None


def _print_verdict(out: Path, summaries: dict[str, Summary]) -> None:
    console = Console(highlight=False)
    for name, label in (("untrained", "before training"), ("model", "after training")):
        s = summaries[name]
        ndvi = "–" if s.ndvi_mae is None else f"{s.ndvi_mae:.4f}"
        console.print(f"{label:>15}: leaf PSNR {s.psnr_db:.2f} dB, angle {_degrees(s)}, NDVI error {ndvi}")
    console.print(f"report: {out / 'report.html'}; its pictures: {out / 'pictures'}", soft_wrap=True)
