"""`report.html` of an evaluation: its sections, tables and figures."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from msvae.bands import Bands
from msvae.evaluation.evaluator import Evaluator, Reconstruct
from msvae.evaluation.measurement import Measurement
from msvae.evaluation.results import Row
from msvae.evaluation.summary import EXPLANATIONS, LABELS, cautions, summary
from msvae.messages import counted
from msvae.metrics.histograms import ANGLE_EDGES_DEG, ERROR_EDGES
from msvae.metrics.tile_sums import INDICES
from msvae.report.charts import band_labels, curves_figure, deciles_figure, histograms_figure
from msvae.report.page import Cell, Section, Table, write_page
from msvae.report.pictures import comparison_figure, spectra_figure
from msvae.runs import PANELS, RUN_CARD, VALIDATION, curve, loss_curves, rows_of

Column = tuple[str, str, str]
"""Key in `metrics.json`, heading of the table, and format of the number."""

MAIN_COLUMNS: tuple[Column, ...] = (
    ("psnr_db", "PSNR (dB) ↑", "{:.2f}"),
    ("angle_deg", "spectral angle (°) ↓", "{:.2f}"),
    ("ssim", "SSIM ↑", "{:.3f}"),
    ("ndvi_mae", "NDVI error ↓", "{:.4f}"),
    ("bits_per_value", "bits per value", "{:.2f}"),
)
FURTHER_COLUMNS: tuple[Column, ...] = (
    ("rmse", "RMSE ↓", "{:.4f}"),
    ("mae", "MAE ↓", "{:.4f}"),
    ("angle_median_deg", "median angle (°) ↓", "{:.2f}"),
    ("angle_p95_deg", "95th percentile of angles (°) ↓", "{:.2f}"),
    ("sid", "SID (nat) ↓", "{:.5f}"),
    ("mean_spectrum_rmse", "RMSE of mean spectra ↓", "{:.4f}"),
)
BAND_COLUMNS: tuple[Column, ...] = (
    ("rmse_per_band", "RMSE ↓", "{:.4f}"),
    ("mae_per_band", "MAE ↓", "{:.4f}"),
    ("bias_per_band", "bias", "{:+.4f}"),
    ("psnr_db_per_band", "PSNR (dB) ↑", "{:.2f}"),
    ("ssim_per_band", "SSIM ↑", "{:.3f}"),
)
LATENT_COLUMNS = (
    ("mean_per_channel", "mean"),
    ("std_per_channel", "standard deviation"),
    ("posterior_std_per_channel", "posterior standard deviation"),
    ("kl_per_channel_nats", "KL (nat)"),
)
NUM_WORST = 10
LIBRARIES = ("msvae", "torch", "diffusers", "imagecodecs")


def write_report(
    out: Path,
    model_folder: Path,
    evaluator: Evaluator,
    reconstruct: Reconstruct,
    measurement: Measurement,
    metrics: Mapping[str, Any],
    tables: Mapping[str, Sequence[Row]],
) -> None:
    """Write `report.html` and its pictures. For the main process only.

    Args: folder to write to; folder of the model; evaluator of the split; reconstruction with the model and its
        measurement; content of `metrics.json`; rows of the CSV tables by kind.
    """
    run = model_folder.resolve().parent
    write_page(
        out / "report.html",
        title="Leaf reconstruction report",
        summary=summary(metrics),
        cautions=cautions(metrics),
        sections=[
            _main_section(metrics),
            *_tile_sections(evaluator, reconstruct, tables["tiles"]),
            _histogram_section(measurement, evaluator.bands),
            *_location_sections(metrics),
            *_training_sections(run),
            *_detail_sections(metrics, evaluator.bands),
            *_worst_sections(tables),
        ],
        facts=_facts(evaluator, metrics, run),
        facts_heading="Data, model and software",
    )


def _main_section(metrics: Mapping[str, Any]) -> Section:
    evaluated = metrics["judged"]
    units = counted(evaluated["num_drawn"], evaluated["interval_unit"])
    intervals = (
        f"The small print below a number is its 95 % confidence interval, from {evaluated['num_resamples']:,} "
        f"bootstrap resamples of {units}."
        if metrics["model"]["intervals"]
        else ""
    )
    caption = (
        "All numbers are computed on leaf pixels only. ↑: higher is better. ↓: lower is better. PSNR is the peak "
        "signal-to-noise ratio for a peak reflectance of 1. The spectral angle is the angle between the original and "
        "the reconstructed spectrum of a pixel. SSIM is the structural similarity, at most 1. NDVI error is the mean "
        f"absolute error of the NDVI. A value is the reflectance of one pixel in one band. {intervals}"
    )
    return Section("Quality of the reconstructions", caption, _metrics_table(metrics, MAIN_COLUMNS, explain=True))


def _metrics_table(metrics: Mapping[str, Any], columns: Sequence[Column], explain: bool = False) -> Table:
    """Return a table with one row per reconstruction, the model first."""
    shown = [column for column in columns if metrics["model"].get(column[0]) is not None]
    rows = [
        [Cell(LABELS[name], explain * EXPLANATIONS[name]), *(_cell(numbers, key, form) for key, _, form in shown)]
        for name, numbers in _reconstructions(metrics).items()
    ]
    return Table(["reconstruction", *(heading for _, heading, _ in shown)], rows, highlight_first_row=True)


def _reconstructions(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    every = {"model": metrics["model"], **metrics["baselines"]}
    return {name: every[name] for name in LABELS if name in every}


def _cell(numbers: Mapping[str, Any], key: str, form: str, index: int | None = None) -> Cell:
    """Return a number, or the entry `index` of a list of numbers, with its interval."""
    value, ends = numbers.get(key), numbers["intervals"].get(key)
    if index is not None:
        value, ends = (None if x is None else x[index] for x in (value, ends))
    return Cell.with_interval(value, ends, form)


def _tile_sections(evaluator: Evaluator, reconstruct: Reconstruct, tiles: Sequence[Row]) -> Iterator[Section]:
    """Show the tiles with the smallest, the median and the largest error. `tiles` has the largest error first."""
    rows = dict.fromkeys((len(tiles) - 1, len(tiles) // 2, 0))
    examples = evaluator.examples(reconstruct, [tiles[row]["slot"] for row in rows])
    yield Section(
        "Best, median and worst tile",
        "From top to bottom: the tile with the smallest, the median and the largest RMSE. The yellow line is the "
        "border of the leaf mask. Reconstructions are shown inside the leaf mask only, because the model is neither "
        "trained nor evaluated on the background.",
        comparison_figure(examples, evaluator.bands),
        "tiles",
    )
    yield Section(
        "Leaf spectra",
        "Mean spectra of all leaf pixels of the tiles above. The shaded area is one standard deviation. For a good "
        "model, the lines and the areas of original and reconstruction coincide.",
        spectra_figure(examples, evaluator.bands),
        "spectra",
    )


def _histogram_section(measurement: Measurement, bands: Bands) -> Section:
    return Section(
        "Distribution of errors",
        "Left: error of every leaf pixel in each band. A peak that is not at 0 shows a bias. Errors beyond ±0.2 are "
        "counted in the outermost bins. Right: percentage of leaf pixels whose spectral angle is below the value on "
        "the horizontal axis. Dotted lines mark the median and the 95th percentile.",
        histograms_figure(
            ERROR_EDGES, measurement.error_counts, ANGLE_EDGES_DEG, measurement.angle_counts.sum(axis=0), bands
        ),
        "errors",
    )


def _location_sections(metrics: Mapping[str, Any]) -> Iterator[Section]:
    model, edges = metrics["model"], metrics["judged"]["brightness_edges"]
    ends = model["intervals"]
    yield Section(
        "Errors in dark and bright leaf areas",
        "Leaf pixels in ten groups of equal size, from dark to bright in the original. Black lines are 95 % "
        "intervals. An error of the same size changes the spectral angle of a dark pixel more than that of a bright "
        "pixel.",
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
        "Errors at the leaf edge and inside the leaf",
        f"The edge consists of the leaf pixels that are at most {metrics['judged']['edge_px']} pixels away from the "
        "background. The border of a tile does not count as a leaf edge.",
        Table(
            ["reconstruction", "RMSE, edge ↓", "RMSE, interior ↓", "angle (°), edge ↓", "angle (°), interior ↓"],
            [
                [Cell(LABELS[name]), *(_cell(numbers, key, form, zone) for key, form in columns for zone in (0, 1))]
                for name, numbers in _reconstructions(metrics).items()
            ],
            highlight_first_row=True,
        ),
    )


def _training_sections(run: Path) -> Iterator[Section]:
    """Show the curves of the training run that the model belongs to, if its log files exist."""
    rows = rows_of(run / VALIDATION)
    curves = {label: curve(rows, name) for name, label in PANELS.items()}
    panels = {"loss": loss_curves(run), **{label: {"": own} for label, own in curves.items() if own is not None}}
    if rows:
        yield Section(
            "Training",
            "If the validation curves still improve at the end, train for more steps. If they get worse while the "
            "training loss still falls, the model overfits: train on more images.",
            curves_figure(panels),
            "training",
        )


def _detail_sections(metrics: Mapping[str, Any], bands: Bands) -> Iterator[Section]:
    model, unit = metrics["model"], metrics["judged"]["interval_unit"]
    yield Section(
        "Further metrics",
        "RMSE (root mean squared error) and MAE (mean absolute error) are in reflectance. SID is the spectral "
        f"information divergence. The last column is the error of the mean leaf spectrum of each {unit}.",
        _metrics_table(metrics, FURTHER_COLUMNS),
    )
    yield Section(
        "Metrics per band",
        "Metrics of the model in each band. The bias is the mean of reconstruction minus original.",
        Table(
            ["band", *(heading for _, heading, _ in BAND_COLUMNS)],
            [
                [Cell(label), *(_cell(model, key, form, band) for key, _, form in BAND_COLUMNS)]
                for band, label in enumerate(band_labels(bands))
            ],
        ),
    )
    indices = [index for index in INDICES if model[f"{index}_mae"] is not None]
    if indices:
        yield Section(
            "Vegetation indices",
            "Mean absolute error of each index (↓). The last row is the bias of the model: the mean of reconstruction "
            "minus original.",
            Table(
                ["reconstruction", *({"cire": "CIre"}.get(index, index.upper()) for index in indices)],
                [
                    *(
                        [Cell(LABELS[name]), *(_cell(numbers, f"{index}_mae", "{:.4f}") for index in indices)]
                        for name, numbers in _reconstructions(metrics).items()
                    ),
                    [Cell("bias of the model"), *(_cell(model, f"{index}_bias", "{:+.4f}") for index in indices)],
                ],
                highlight_first_row=True,
            ),
        )
    yield _latent_section(metrics["latent"], metrics["rate"])


def _latent_section(latent: Mapping[str, Any], rate: Mapping[str, Any]) -> Section:
    side = rate["block_px"]
    latent_bytes, stored_bytes = (rate[f"{kind}_bits_per_tile"] // 8 for kind in ("latent", "stored"))
    caption = (
        f"The model represents {side} x {side} pixels by {counted(rate['values_per_block'], 'value')}, one per "
        f"channel. A tile, with its background, needs {latent_bytes:,} bytes as float16 latents and {stored_bytes:,} "
        f"bytes in uncompressed shards. The ratio is {rate['ratio_float16']:.3g}, or {rate['ratio_float32']:.3g} with "
        f"float32 latents. {latent['active_channels']} of {counted(len(latent['mean_per_channel']), 'channel')} are "
        "active: their values vary over the leaf. The statistics are weighted by the leaf share of each latent cell. "
        "KL is the divergence of the posterior from the standard normal distribution."
    )
    channels = zip(*(latent[name] for name, _ in LATENT_COLUMNS), strict=True)
    rows = [[Cell(f"channel {i}"), *(Cell(f"{value:.3f}") for value in values)] for i, values in enumerate(channels)]
    return Section("Latents", caption, Table(["", *(heading for _, heading in LATENT_COLUMNS)], rows))


def _worst_sections(tables: Mapping[str, Sequence[Row]]) -> Iterator[Section]:
    for kind, name in (("images", "image"), ("tiles", "tile")):
        rows = tables[kind]
        if len(rows) > 1:
            yield Section(
                f"{kind.capitalize()} with the largest errors",
                f"Sorted by RMSE. The file {kind}.csv lists all {len(rows):,} {kind}.",
                Table(
                    [name, "leaf pixels", "RMSE ↓", "spectral angle (°) ↓", "SSIM ↑"],
                    [
                        [Cell(row[name]), Cell(f"{row['leaf_pixels']:,}"), *_metric_cells(row)]
                        for row in rows[:NUM_WORST]
                    ],
                ),
            )


def _metric_cells(row: Row) -> list[Cell]:
    forms = (("rmse", "{:.4f}"), ("angle_deg", "{:.2f}"), ("ssim", "{:.3f}"))
    return [Cell("–" if row[name] is None else form.format(row[name])) for name, form in forms]


def _facts(evaluator: Evaluator, metrics: Mapping[str, Any], run: Path) -> dict[str, str]:
    manifest, evaluated = evaluator.reader.manifest, metrics["judged"]
    model = metrics["model"]
    card = json.loads((run / RUN_CARD).read_text()) if (run / RUN_CARD).is_file() else {}
    versions = ", ".join(f"{library} {importlib.metadata.version(library)}" for library in LIBRARIES)
    return {
        "model": evaluated["model"],
        "split": f"{evaluated['split']}: {counted(model['num_tiles'], 'tile')} of {manifest.tile_px} px from "
        f"{counted(evaluated['num_images'], 'image')}, {counted(model['num_leaf_pixels'], 'leaf pixel')}",
        "bands": ", ".join(band_labels(evaluator.bands)),
        "manifest digest of this split": manifest.digest(),
        "versions for this evaluation": versions,
        **{f"training: {name}": value for name, value in card.items()},
    }
