"""`report.html`: what was found out, put into sections."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msvae.bands import Bands
from msvae.evaluation.evaluator import Evaluator, Reconstruct
from msvae.evaluation.measurement import Judged
from msvae.evaluation.summary import EXPLANATIONS, LABELS, cautions, verdict
from msvae.evaluation.tables import Row
from msvae.messages import counted
from msvae.metrics.histograms import ANGLE_EDGES_DEG, ERROR_EDGES
from msvae.metrics.indices import INDICES
from msvae.report.charts import curves_figure, deciles_figure, histograms_figure, labels_of
from msvae.report.page import Cell, Section, Table, write_report
from msvae.report.pictures import comparison_figure, spectra_figure
from msvae.runs import PANELS, RUN_CARD, VALIDATION, line, loss_lines, rows_of

HEADLINE = (
    ("psnr_db", "PSNR (dB) ↑", "{:.2f}"),
    ("angle_deg", "angle (°) ↓", "{:.2f}"),
    ("ssim", "SSIM ↑", "{:.3f}"),
    ("ndvi_mae", "NDVI error ↓", "{:.4f}"),
    ("bits_per_value", "bits a value", "{:.2f}"),
)
MORE = (
    ("rmse", "RMSE ↓", "{:.4f}"),
    ("mae", "MAE ↓", "{:.4f}"),
    ("angle_median_deg", "median angle (°) ↓", "{:.2f}"),
    ("angle_p95_deg", "95th percentile (°) ↓", "{:.2f}"),
    ("sid", "SID (nat) ↓", "{:.5f}"),
    ("mean_spectrum_rmse", "mean spectrum ↓", "{:.4f}"),
)
PER_BAND = (
    ("rmse_per_band", "RMSE ↓", "{:.4f}"),
    ("mae_per_band", "MAE ↓", "{:.4f}"),
    ("bias_per_band", "bias", "{:+.4f}"),
    ("psnr_db_per_band", "PSNR (dB) ↑", "{:.2f}"),
    ("ssim_per_band", "SSIM ↑", "{:.3f}"),
)
NUM_WORST = 10
LIBRARIES = ("msvae", "torch", "diffusers", "imagecodecs")


def write_page(
    out: Path,
    model_folder: Path,
    evaluator: Evaluator,
    reconstruct: Reconstruct,
    judged: Judged,
    metrics: Mapping[str, Any],
    tables: Mapping[str, Sequence[Row]],
) -> None:
    """Write `report.html` and its pictures; of the main process."""
    run = model_folder.resolve().parent
    write_report(
        out / "report.html",
        title="Leaf reconstruction report",
        verdict=verdict(metrics),
        cautions=cautions(metrics),
        sections=[
            _headline(metrics),
            *_pictures(evaluator, reconstruct, tables["tiles"]),
            _histograms(judged, evaluator.bands),
            *_where(metrics),
            *_training_curves(run),
            *_details(metrics, evaluator.bands),
            *_worst(tables),
        ],
        facts=_facts(evaluator, metrics, run),
        facts_heading="Run card",
    )


def _headline(metrics: Mapping[str, Any]) -> Section:
    judged = metrics["judged"]
    drawn = counted(judged["num_drawn"], judged["interval_unit"])
    caption = (
        "Leaf pixels only, in reflectance. PSNR is against a reflectance of 1. ↑ more is better, ↓ less is. Below "
        f"each number its 95 % interval, from {judged['num_resamples']:,} resamples of {drawn}. A value is one band "
        "of one pixel."
    )
    return Section("Numbers", caption, _comparison(metrics, HEADLINE, explains=True))


def _comparison(metrics: Mapping[str, Any], columns: Sequence[tuple[str, str, str]], explains: bool = False) -> Table:
    """A row a reconstruction, the model first."""
    shown = [column for column in columns if metrics["model"].get(column[0]) is not None]
    rows = [
        [Cell(LABELS[name], explains * EXPLANATIONS[name]), *(_cell(numbers, key, form) for key, _, form in shown)]
        for name, numbers in _reconstructions(metrics).items()
    ]
    return Table(["reconstruction", *(heading for _, heading, _ in shown)], rows, stresses_first_row=True)


def _reconstructions(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    every = {"model": metrics["model"], **metrics["baselines"]}
    return {name: every[name] for name in EXPLANATIONS if name in every}


def _cell(numbers: Mapping[str, Any], key: str, form: str, place: int | None = None) -> Cell:
    value, ends = numbers.get(key), numbers["intervals"].get(key)
    if place is not None:
        value, ends = (None if x is None else x[place] for x in (value, ends))
    if value is None:
        return Cell("–")
    return Cell(form.format(value), "" if not ends or None in ends else " to ".join(form.format(end) for end in ends))


def _pictures(evaluator: Evaluator, reconstruct: Reconstruct, tiles: Sequence[Row]) -> Iterator[Section]:
    """Of the tiles with the smallest, the median and the largest error; `tiles` stand worst first."""
    places = dict.fromkeys((len(tiles) - 1, len(tiles) // 2, 0))
    examples = evaluator.examples(reconstruct, [tiles[place]["slot"] for place in places])
    yield Section(
        "Best, median and worst tile",
        "From the top: the tile with the smallest, the median and the largest error. Outside the leaf mask nothing is "
        "learned or judged, so reconstructions are shown on the leaf alone.",
        comparison_figure(examples, evaluator.bands),
        "tiles",
    )
    yield Section(
        "Leaf spectra",
        "Leaf pixels of the tiles above. The lines should lie on each other, and so should the shaded spreads.",
        spectra_figure(examples, evaluator.bands),
        "spectra",
    )


def _histograms(judged: Judged, bands: Bands) -> Section:
    return Section(
        "How errors spread",
        "Left: errors of every leaf pixel, band by band; a hump beside 0 is a bias, and errors beyond 0.2 "
        "stand at the ends. Right: the share of leaf pixels whose spectral angle is smaller; dotted, the median and "
        "the 95th percentile.",
        histograms_figure(ERROR_EDGES, judged.error_counts, ANGLE_EDGES_DEG, judged.angle_counts.sum(axis=0), bands),
        "errors",
    )


def _where(metrics: Mapping[str, Any]) -> Iterator[Section]:
    model, edges = metrics["model"], metrics["judged"]["brightness_edges"]
    ends = model["intervals"]
    yield Section(
        "Dark and bright leaf",
        "Leaf pixels in ten equal parts by the brightness of the original, with 95 % intervals. The same "
        "error turns the spectrum of a dark pixel further.",
        deciles_figure(
            edges,
            model["rmse_per_decile"],
            ends.get("rmse_per_decile"),
            model["angle_deg_per_decile"],
            ends.get("angle_deg_per_decile"),
        ),
        "deciles",
    )
    columns = (("rmse_per_zone", "{:.4f}"), ("angle_deg_per_zone", "{:.2f}"))
    yield Section(
        "Leaf edge and interior",
        f"Edge: leaf pixels within {metrics['judged']['edge_px']} pixels of background. The border of a tile is no "
        "edge.",
        Table(
            ["reconstruction", "RMSE, edge", "RMSE, interior", "angle (°), edge", "angle (°), interior"],
            [
                [Cell(LABELS[name]), *(_cell(numbers, key, form, zone) for key, form in columns for zone in (0, 1))]
                for name, numbers in _reconstructions(metrics).items()
            ],
            stresses_first_row=True,
        ),
    )


def _training_curves(run: Path) -> Iterator[Section]:
    """Of the run that a model lies in, where it left any."""
    rows = rows_of(run / VALIDATION)
    lines = {label: line(rows, name) for name, label in PANELS.items()}
    panels = {"loss": loss_lines(run), **{label: {"": own} for label, own in lines.items() if own is not None}}
    if rows:
        yield Section(
            "Training",
            "Curves that still improve ask for more steps, those that turn on the validation split for more images.",
            curves_figure(panels),
            "training",
        )


def _details(metrics: Mapping[str, Any], bands: Bands) -> Iterator[Section]:
    model = metrics["model"]
    yield Section(
        "Further errors",
        "RMSE, MAE and mean spectrum in reflectance; the last is the error of each image's mean leaf spectrum. SID: "
        "spectral information divergence.",
        _comparison(metrics, MORE),
    )
    labels = labels_of(bands)
    yield Section(
        "Band by band",
        "Of the model. Bias: reconstruction less original.",
        Table(
            ["band", *(heading for _, heading, _ in PER_BAND)],
            [
                [Cell(label), *(_cell(model, key, form, band) for key, _, form in PER_BAND)]
                for band, label in enumerate(labels)
            ],
        ),
    )
    indices = [index for index in INDICES if model[f"{index}_mae"] is not None]
    if indices:
        yield Section(
            "Vegetation indices",
            "Mean absolute error, and the model's bias: reconstruction less original.",
            Table(
                ["reconstruction", *({"cire": "CIre"}.get(index, index.upper()) for index in indices)],
                [
                    *(
                        [Cell(LABELS[name]), *(_cell(numbers, f"{index}_mae", "{:.4f}") for index in indices)]
                        for name, numbers in _reconstructions(metrics).items()
                    ),
                    [Cell("bias of the model"), *(_cell(model, f"{index}_bias", "{:+.4f}") for index in indices)],
                ],
                stresses_first_row=True,
            ),
        )
    yield _latents(metrics["latent"], metrics["rate"])


def _latents(latent: Mapping[str, Any], rate: Mapping[str, Any]) -> Section:
    columns = ("mean_per_channel", "std_per_channel", "posterior_std_per_channel", "kl_per_channel_nats")
    side = rate["block_px"]
    latent_bytes, stored_bytes = (rate[f"{kind}_bits_per_tile"] // 8 for kind in ("latent", "stored"))
    caption = (
        f"{counted(rate['values_per_block'], 'value')} for {side} x {side} pixels; cells count by their leaf share. A "
        f"tile takes {latent_bytes:,} bytes with float16 latents and {stored_bytes:,} as stored, background included: "
        f"{rate['ratio_float16']:.3g} to 1, or {rate['ratio_float32']:.3g} to 1 with float32. "
        f"{latent['active_channels']} of {counted(len(latent['mean_per_channel']), 'channel')} are in use."
    )
    channels = zip(*(latent[name] for name in columns), strict=True)
    rows = [[Cell(f"channel {i}"), *(Cell(f"{value:.3f}") for value in values)] for i, values in enumerate(channels)]
    return Section("Latents", caption, Table(["", "mean", "std", "posterior std", "KL (nat)"], rows))


def _worst(tables: Mapping[str, Sequence[Row]]) -> Iterator[Section]:
    for kind, name in (("images", "image"), ("tiles", "tile")):
        rows = tables[kind]
        if len(rows) > 1:
            yield Section(
                f"Worst {kind}",
                f"By RMSE. All {len(rows):,} stand in {kind}.csv.",
                Table(
                    [name, "leaf pixels", "RMSE", "angle (°)", "SSIM"],
                    [[Cell(row[name]), Cell(f"{row['leaf_pixels']:,}"), *_formatted(row)] for row in rows[:NUM_WORST]],
                ),
            )


def _formatted(row: Row) -> list[Cell]:
    forms = (("rmse", "{:.4f}"), ("angle_deg", "{:.2f}"), ("ssim", "{:.3f}"))
    return [Cell("–" if row[name] is None else form.format(row[name])) for name, form in forms]


def _facts(evaluator: Evaluator, metrics: Mapping[str, Any], run: Path) -> dict[str, str]:
    manifest, judged = evaluator.reader.manifest, metrics["judged"]
    model = metrics["model"]
    card = json.loads((run / RUN_CARD).read_text()) if (run / RUN_CARD).is_file() else {}
    versions = ", ".join(f"{library} {importlib.metadata.version(library)}" for library in LIBRARIES)
    return {
        "model": judged["model"],
        "split": f"{judged['split']}: {counted(model['num_tiles'], 'tile')} of {manifest.tile_px} px of "
        f"{counted(judged['num_images'], 'image')}, {counted(model['num_leaf_pixels'], 'leaf pixel')}",
        "bands": ", ".join(labels_of(evaluator.bands)),
        "manifest digest, judged": manifest.digest(),
        "versions, judging": versions,
        **{f"training: {name}": value for name, value in card.items()},
    }
