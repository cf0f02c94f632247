"""What the numbers of an evaluation say, in sentences."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msvae.evaluation.units import FEW_UNITS
from msvae.messages import counted

EXPLANATIONS = {
    "model": "this model",
    "pca_latent": "as many principal components of each block of pixels as a latent cell has values",
    "jpeg_xl": "each band as a grey image of 16 bits, in the bytes of the latents",
    "jpeg_2000": "the same with another codec",
    "pca3": "each spectrum through 3 principal components; every spatial detail is kept",
    "mean_spectrum": "the mean leaf spectrum of the training split everywhere",
    "untrained": "the model before its first step",
}
"""The rows of the table, in their order."""
LABELS = {
    "model": "model",
    "pca_latent": "PCA of blocks",
    "jpeg_xl": "JPEG XL",
    "jpeg_2000": "JPEG 2000",
    "pca3": "PCA of spectra",
    "mean_spectrum": "mean spectrum",
    "untrained": "untrained",
}
CLEAR_GAIN_DB = 1.0
"""Over the mean spectrum: what has learned anything of leaves gains more."""
SAME_SIZE = ("pca_latent", "jpeg_xl", "jpeg_2000")


def verdict(metrics: Mapping[str, Any]) -> str:
    """Three sentences: how good, against what takes the same room, against what keeps no detail or all of it."""
    model, rivals = metrics["model"], metrics["baselines"]
    gain_db = model["psnr_db"] - rivals["untrained"]["psnr_db"]
    ends = model["intervals"].get("psnr_db")
    sure = f" (95 % interval {ends[0]:.2f} to {ends[1]:.2f})" if ends else ""
    angle = "" if model["angle_deg"] is None else f" and a spectral angle of {model['angle_deg']:.2f}°"
    return (
        f"Leaf reconstructions reach {model['psnr_db']:.2f} dB PSNR{sure}{angle}, "
        f"{'up' if gain_db > 0 else 'down'} {abs(gain_db):.2f} dB from the untrained model. "
        f"{_at_same_size(metrics)} "
        f"{_against_extremes(model, rivals['mean_spectrum'], rivals.get('pca3'))}"
    )


def cautions(metrics: Mapping[str, Any]) -> list[str]:
    """What a reader must know before believing the numbers."""
    judged, rivals = metrics["judged"], metrics["baselines"]
    kind, drawn = judged["interval_unit"], judged["num_drawn"]
    found = []
    if Path(judged["split"]).name == "train":
        found.append("The model was trained on these very tiles: on leaves it has not seen it will do worse.")
    if drawn == 1:
        found.append("A single tile was judged, so nothing can be said of how sure the numbers are.")
    elif drawn < FEW_UNITS:
        found.append(
            f"Only {counted(drawn, kind)} {'were' if drawn > 1 else 'was'} judged: the numbers are rough, and "
            "intervals from so few are too narrow."
        )
    if kind != "image" and drawn > 1:
        found.append(
            f"All tiles are of one image, so intervals were drawn over its {kind}s: they say nothing of other images."
        )
    if rivals.get("pca_latent", {}).get("fitted_on_judged"):
        found.append(
            "No training split of the same kind lies beside the judged one, so PCA of blocks was fitted on the judged "
            "tiles themselves and does better than it could."
        )
    for name in ("jpeg_xl", "jpeg_2000"):
        if missed := rivals[name]["tiles_that_do_not_fit"]:
            found.append(
                f"{LABELS[name]} cannot code {missed:,} of {counted(metrics['model']['num_tiles'], 'tile')} in so few "
                "bytes, where headers weigh much; they count as the mean leaf spectrum, and the verdict leaves it out."
            )
    return found


def _error(numbers: Mapping[str, Any]) -> str:
    """PSNR and mean spectral angle, which a single band has not."""
    angle = "" if numbers["angle_deg"] is None else f", {numbers['angle_deg']:.2f}°"
    return f"{numbers['psnr_db']:.2f} dB{angle}"


def summary_lines(metrics: Mapping[str, Any]) -> list[str]:
    """For the screen: before, after, and what else would fit the same room."""
    lines = []
    for label, numbers in (
        ("before training", metrics["baselines"]["untrained"]),
        ("after training", metrics["model"]),
    ):
        angle = "" if numbers["angle_deg"] is None else f", angle {numbers['angle_deg']:.2f}°"
        ndvi = "" if numbers.get("ndvi_mae") is None else f", NDVI error {numbers['ndvi_mae']:.4f}"
        lines.append(f"{label:>15}: leaf PSNR {numbers['psnr_db']:.2f} dB{angle}{ndvi}")
    rivals = ", ".join(
        f"{LABELS[name]} {metrics['baselines'][name]['psnr_db']:.2f} dB" for name in _of_same_size(metrics)
    )
    return [*lines, f"{'at equal size':>15}: {rivals or 'nothing else fits'}"]


def _of_same_size(metrics: Mapping[str, Any]) -> list[str]:
    """Rivals that could keep every tile in as many bits."""
    rivals = metrics["baselines"]
    return [name for name in SAME_SIZE if name in rivals and not rivals[name].get("tiles_that_do_not_fit")]


def _at_same_size(metrics: Mapping[str, Any]) -> str:
    """The model against what takes as many bits."""
    better: list[str] = []
    even: list[str] = []
    worse: list[str] = []
    for name in _of_same_size(metrics):
        difference = metrics["differences"][name]["psnr_db"]
        low, high = difference["interval"] or (difference["value"],) * 2
        place = better if low > 0 else worse if high < 0 else even
        place.append(f"{LABELS[name]} ({metrics['baselines'][name]['psnr_db']:.2f} dB)")
    parts = [
        f"{words} {_listed(names)}"
        for words, names in (("better than", better), ("not told apart from", even), ("worse than", worse))
        if names
    ]
    rate = metrics["rate"]
    return (
        f"At the same size, {rate['bits_per_value']:.2f} bits a value or {rate['ratio_float16']:.3g} times less than "
        f"stored, {'it is ' + ', '.join(parts) if parts else 'nothing else keeps every tile'}."
    )


def _against_extremes(model: Mapping[str, Any], mean: Mapping[str, Any], pca3: Mapping[str, Any] | None) -> str:
    gain_db = model["psnr_db"] - mean["psnr_db"]
    better = "no better" if gain_db <= 0 else "hardly better" if gain_db < CLEAR_GAIN_DB else "better"
    versus_mean = (
        f"It is {better} than the mean leaf spectrum everywhere ({_error(mean)}), which tells no leaf tissues apart"
    )
    if pca3 is None:
        return f"{versus_mean}."
    versus_pca = "above" if model["psnr_db"] > pca3["psnr_db"] else "below"
    return (
        f"{versus_mean}, and stands {versus_pca} three principal components of every pixel "
        f"({_error(pca3)}), which keep all spatial detail at many times the size."
    )


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
