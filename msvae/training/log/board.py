"""TensorBoard's side of the log: how numbers are grouped, what stands on the first page, what is said of the run."""

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
"""Names of a row that stand in a folder of their own, `train_coverage/…`. The rest is in `train/` or `validation/`."""
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
"""What TensorBoard calls it where that differs from the row."""
UNSHOWN = ("step", "empty_tiles")
COMPARED = ("validation/loss", "validation/psnr_db", "validation/angle_deg", "validation/ndvi_mae")
"""In the table of runs, beside the settings; their last values."""


def _lines(*tags: str) -> list[Any]:
    return ["Multiline", [f"^{tag}$" for tag in tags]]


LAYOUT = {
    "How well leaves come back": {
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
        "leaf share of the tiles: mean, least, most": [
            "Margin", ["train_coverage/mean", "train_coverage/min", "train_coverage/max"]
        ],
        "bad samples, and steps skipped so far": _lines("train_data/bad_samples", "train_optimizer/skipped_steps"),
    },
    "How it runs": {
        "tiles a second": _lines("train_speed/tiles_per_s"),
        "seconds a step, and of them waited": _lines(
            "train_speed/step_s", "train_speed/data_wait_s", "train_speed/join_s"
        ),
        "gradient norm": _lines("train_optimizer/grad_norm"),
        "learning rate": _lines("train_optimizer/lr.*"),
    },
}  # fmt: skip
"""Of the custom scalars page."""


class Board:
    """Event files of a run. What earlier ones hold from `first_step` on is dropped by whoever reads them."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=first_step)
        self._first_step = first_step

    def row(self, kind: str, row: Mapping[str, Any]) -> None:
        """The numbers of a logged step (`train`) or an evaluation (`validation`)."""
        for tag, value in tags_of(kind, row):
            self._writer.add_scalar(tag, value, row["step"])

    def figure(self, tag: str, figure: Figure, step: int) -> None:
        """A picture."""
        self._writer.add_figure(tag, figure, step)

    def describe(self, texts: Mapping[str, str], settings: Mapping[str, Any]) -> None:
        """Texts in Markdown by tag, settings for the table of runs, and the layout of the first page."""
        for tag, text in texts.items():
            self._writer.add_text(tag, text, self._first_step)
        # SummaryWriter.add_hparams would make a run of its own for them
        experiment, session, _ = hparams(dict(settings), dict.fromkeys(COMPARED, 0.0))
        for summary in (experiment, session, custom_scalars(LAYOUT)):
            self._writer.file_writer.add_summary(summary, self._first_step)

    def flush(self) -> None:
        """Have everything in files."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


def tags_of(kind: str, row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Tag and value of all numbers of a row."""
    folder_of = {name: f"{kind}_{folder}" for folder, names in FOLDERS[kind].items() for name in names}
    for name, value in row.items():
        if isinstance(value, Mapping):
            of_parts = {part: number for part, number in value.items() if number is not None}
            yield from ((f"{kind}_{TAGS.get(name, name)}/{part}", number) for part, number in of_parts.items())
        elif isinstance(value, int | float) and name not in UNSHOWN:
            yield f"{folder_of.get(name, kind)}/{TAGS.get(name, name)}", value
