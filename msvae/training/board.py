"""TensorBoard event files of a run: tags of its numbers, layout of the custom scalars page, and description."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams

FOLDERS = {
    "train": {
        "coverage": ("coverage", "coverage_min", "coverage_max", "coverage_skew", "empty_share"),
        "data": ("epoch", "valid_pixels", "bad_samples", "nonfinite_elements"),
        "optimizer": ("lr", "lr_backbone", "grad_norm", "ema_distance", "skipped_steps"),
        "speed": (
            "samples_per_s", "samples_per_s_per_device", "leaf_pixels_per_s", "leaf_pixels_per_s_per_device",
            "step_s", "data_wait_s", "join_s", "host_memory_gb", "device_memory_gb",
        ),
    },
    "validation": {},
}  # fmt: skip
"""Names in a row whose tags are in a separate group, such as `train_coverage/…`. All other tags are in `train/` or
`validation/`."""
TAGS = {
    "coverage": "mean",
    "coverage_min": "min",
    "coverage_max": "max",
    "coverage_skew": "skew_between_ranks",
    "samples_per_s": "tiles_per_s",
    "samples_per_s_per_device": "tiles_per_s_per_device",
    "valid_pixels": "leaf_pixels",
    "mse_per_channel": "mse",
}
"""Tags of names in a row whose tag differs from the name."""
NOT_SHOWN = ("step", "empty_tiles")
COMPARED = ("validation/loss", "validation/psnr_db", "validation/angle_deg", "validation/ndvi_mae")
"""Tags whose last values are in the table of runs (HParams), next to the settings."""


def _lines(*tags: str) -> list[Any]:
    return ["Multiline", [f"^{tag}$" for tag in tags]]


LAYOUT = {
    "How well leaves are reconstructed": {
        "training loss": _lines("train/loss"),
        "validation loss": _lines("validation/loss"),
        "training: spectral angle (degrees)": _lines("train/angle_deg"),
        "validation: spectral angle (degrees)": _lines("validation/angle_deg"),
        "validation: leaf PSNR (dB)": _lines("validation/psnr_db"),
        "validation: error of NDVI and NDRE": _lines("validation/ndvi_mae", "validation/ndre_mae"),
    },
    "Band by band": {
        "validation: RMSE (reflectance)": _lines("validation_rmse/.*"),
        "band importance": _lines("validation_band_importance/.*"),
    },
    "What it is trained on": {
        "leaf share of the tiles: mean, minimum, maximum": [
            "Margin", ["train_coverage/mean", "train_coverage/min", "train_coverage/max"]
        ],
        "bad samples, and skipped steps so far": _lines("train_data/bad_samples", "train_optimizer/skipped_steps"),
    },
    "How it runs": {
        "tiles per second": _lines("train_speed/tiles_per_s"),
        "seconds per step, and the part spent waiting": _lines(
            "train_speed/step_s", "train_speed/data_wait_s", "train_speed/join_s"
        ),
        "gradient norm": _lines("train_optimizer/grad_norm"),
        "learning rate": _lines("train_optimizer/lr.*"),
    },
}  # fmt: skip
"""Layout of the custom scalars page: tags of each chart, by section and title."""


class Board:
    """Writes the event files of a run. TensorBoard then drops values of earlier files from `first_step` on."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=first_step)
        self._first_step = first_step

    def row(self, kind: str, row: Mapping[str, Any]) -> None:
        """Write the numbers of a logged step (`train`) or of an evaluation (`validation`)."""
        for tag, value in tags_of(kind, row):
            self._writer.add_scalar(tag, value, row["step"])

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """Write a picture."""
        self._writer.add_figure(tag, figure, step)

    def describe(self, texts: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """Write Markdown texts by tag, settings for the table of runs, and `LAYOUT`."""
        for tag, text in texts.items():
            self._writer.add_text(tag, text, self._first_step)
        # SummaryWriter.add_hparams would create a separate run for them
        experiment, session, _ = hparams(dict(settings), dict.fromkeys(COMPARED, 0.0))
        for summary in (experiment, session, custom_scalars(LAYOUT)):
            self._writer.file_writer.add_summary(summary, self._first_step)

    def flush(self) -> None:
        """Write buffered values to the file."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def tags_of(kind: str, row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield tag and value of each number in a row."""
    folder_of = {name: f"{kind}_{folder}" for folder, names in FOLDERS[kind].items() for name in names}
    for name, value in row.items():
        if isinstance(value, Mapping):
            numbers = {part: number for part, number in value.items() if number is not None}
            yield from ((f"{kind}_{TAGS.get(name, name)}/{part}", number) for part, number in numbers.items())
        elif isinstance(value, int | float) and name not in NOT_SHOWN:
            yield f"{folder_of.get(name, kind)}/{TAGS.get(name, name)}", value
