"""Sentences about the results of an evaluation: the summary of a report, its cautions, and lines for the screen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msvae.messages import counted

LABELS = {
    "model": "model",
    "pca_latent": "PCA of blocks",
    "jpeg_xl": "JPEG XL",
    "jpeg_2000": "JPEG 2000",
    "pca3": "PCA of spectra",
    "mean_spectrum": "mean spectrum",
    "untrained": "untrained model",
}
"""Names of the reconstructions in a report, in the order of the rows of its tables."""
EXPLANATIONS = {
    "model": "the evaluated model",
    "pca_latent": "each block of pixels from as many principal components as the model has latent channels",
    "jpeg_xl": "each band as a 16-bit grey image, in as many bytes as the latents",
    "jpeg_2000": "each band as a 16-bit grey image, in as many bytes as the latents",
    "pca3": "each spectrum from 3 principal components; keeps every spatial detail",
    "mean_spectrum": "the mean leaf spectrum of the training split in every pixel",
    "untrained": "the model before its first training step",
}
SAME_SIZE = ("pca_latent", "jpeg_xl", "jpeg_2000")
"""Baselines that need as many bits as the latents."""
CLEAR_GAIN_DB = 1.0
"""A smaller gain over the mean spectrum means that the model has learned hardly anything about leaves."""
FEW_UNITS = 10
"""Number of resampled units below which intervals are too narrow."""


def summary(metrics: Mapping[str, Any]) -> str:
    """Return a paragraph that compares the model with baselines of the same size and with two extreme ones."""
    model, baselines = metrics["model"], metrics["baselines"]
    gain_db = model["psnr_db"] - baselines["untrained"]["psnr_db"]
    ends = model["intervals"].get("psnr_db")
    interval = f" (95 % interval {ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
    angle = "" if model["angle_deg"] is None else f"The mean spectral angle is {model['angle_deg']:.2f}°. "
    return (
        f"The model reconstructs leaves with a PSNR of {model['psnr_db']:.2f} dB{interval}, {abs(gain_db):.2f} dB "
        f"{'above' if gain_db > 0 else 'below'} the untrained model. {angle}"
        f"{_compare_same_size(metrics)} "
        f"{_compare_extremes(model, baselines['mean_spectrum'], baselines.get('pca3'))}"
    )


def cautions(metrics: Mapping[str, Any]) -> list[str]:
    """Return the reasons why the numbers are less reliable than they look."""
    evaluated, baselines = metrics["judged"], metrics["baselines"]
    kind, num_units = evaluated["interval_unit"], evaluated["num_drawn"]
    warnings = []
    if Path(evaluated["split"]).name == "train":
        warnings.append("The model was trained on these tiles. On other leaves, its errors will be larger.")
    if num_units == 1:
        warnings.append("Only one tile was evaluated, so there are no confidence intervals.")
    elif num_units < FEW_UNITS:
        warnings.append(
            f"Only {counted(num_units, kind)} were evaluated. The numbers are uncertain, and intervals from so few "
            f"{kind}s are too narrow."
        )
    if kind != "image" and num_units > 1:
        warnings.append(
            f"All tiles are from one image, so the intervals were computed by resampling its {kind}s. They say "
            "nothing about other images."
        )
    if baselines.get("pca_latent", {}).get("fitted_on_judged"):
        warnings.append(
            "The dataset has no training split with the same bands and tile size, so PCA of blocks was fitted on the "
            "evaluated tiles. Its numbers are therefore too good."
        )
    for name in ("jpeg_xl", "jpeg_2000"):
        if num_missing := baselines[name]["tiles_that_do_not_fit"]:
            warnings.append(
                f"{LABELS[name]} cannot store {num_missing:,} of {counted(metrics['model']['num_tiles'], 'tile')} in "
                "so few bytes, because of the size of its headers. These tiles count as the mean leaf spectrum, and "
                f"the summary does not mention {LABELS[name]}."
            )
    return warnings


def summary_lines(metrics: Mapping[str, Any]) -> list[str]:
    """Return lines for the screen: quality before and after training, and the baselines of the same size."""
    lines = []
    for label, numbers in (
        ("before training", metrics["baselines"]["untrained"]),
        ("after training", metrics["model"]),
    ):
        angle = "" if numbers["angle_deg"] is None else f", angle {numbers['angle_deg']:.2f}°"
        ndvi = "" if numbers.get("ndvi_mae") is None else f", NDVI error {numbers['ndvi_mae']:.4f}"
        lines.append(f"{label:>15}: leaf PSNR {numbers['psnr_db']:.2f} dB{angle}{ndvi}")
    baselines = ", ".join(
        f"{LABELS[name]} {metrics['baselines'][name]['psnr_db']:.2f} dB" for name in _same_size_baselines(metrics)
    )
    return [*lines, f"{'at equal size':>15}: {baselines or 'no other method can store every tile'}"]


def _same_size_baselines(metrics: Mapping[str, Any]) -> list[str]:
    """Return the names of the baselines that can store every tile in as many bits as the latents."""
    baselines = metrics["baselines"]
    return [name for name in SAME_SIZE if name in baselines and not baselines[name].get("tiles_that_do_not_fit")]


def _compare_same_size(metrics: Mapping[str, Any]) -> str:
    """Compare with baselines of the same size; `better` and `worse` need an interval that excludes 0."""
    better: list[str] = []
    similar: list[str] = []
    worse: list[str] = []
    for name in _same_size_baselines(metrics):
        difference = metrics["differences"][name]["psnr_db"]
        low, high = difference["interval"] or (difference["value"],) * 2
        names = better if low > 0 else worse if high < 0 else similar
        names.append(f"{LABELS[name]} ({metrics['baselines'][name]['psnr_db']:.2f} dB)")
    parts = [
        f"{comparison} {_join(names)}"
        for comparison, names in (
            ("better than", better),
            ("not clearly different from", similar),
            ("worse than", worse),
        )
        if names
    ]
    rate = metrics["rate"]
    return (
        f"Its latents need {rate['bits_per_value']:.2f} bits per value and are {rate['ratio_float16']:.3g} times "
        "smaller than uncompressed shards. At this size, "
        f"{'it is ' + ', '.join(parts) if parts else 'no other method can store every tile'}."
    )


def _compare_extremes(model: Mapping[str, Any], mean: Mapping[str, Any], pca3: Mapping[str, Any] | None) -> str:
    """Compare with the mean spectrum, which keeps no detail, and with PCA of spectra, which keeps all of it."""
    gain_db = model["psnr_db"] - mean["psnr_db"]
    better = "no better" if gain_db <= 0 else "hardly better" if gain_db < CLEAR_GAIN_DB else "better"
    versus_mean = (
        f"It is {better} than the mean leaf spectrum in every pixel ({_quality(mean)}), which contains no "
        "spatial detail."
    )
    if pca3 is None:
        return versus_mean
    above = "above" if model["psnr_db"] > pca3["psnr_db"] else "below"
    return (
        f"{versus_mean} Its PSNR is {above} that of three principal components per pixel ({_quality(pca3)}), which "
        "keep all spatial detail at many times the size."
    )


def _quality(numbers: Mapping[str, Any]) -> str:
    """Return PSNR and mean spectral angle. A single band has no angle."""
    angle = "" if numbers["angle_deg"] is None else f", {numbers['angle_deg']:.2f}°"
    return f"{numbers['psnr_db']:.2f} dB{angle}"


def _join(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
