"""Draw the pictures of docs/curves.md: curves of runs with a deliberate fault, and of a run without a fault (whole).

python bench/broken_runs.py OUT [--steps 400]

Every run is complete: the script makes synthetic images, moves masks or exchanges bands, packs shards and launches
train.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import rasterio
from matplotlib.figure import Figure
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

from msvae.packing.options import PackOptions
from msvae.packing.pack import pack
from msvae.report.pictures import LEAF, RECON
from msvae.synthetic.images import synthesise

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = [
    sys.executable, "-m", "accelerate.commands.launch",
    "--config_file", str(ROOT / "configs" / "accelerate" / "cpu.yaml"), "--num_processes", "1",
    str(ROOT / "train" / "train.py"), "--config", str(ROOT / "configs" / "train" / "quickstart.yaml"),
]  # fmt: skip
TILE_PX, MASK_SHIFT_PX = 64, 24
SMOOTH_STEPS = 15
Rows = list[dict[str, float]]


@dataclass(frozen=True)
class Fault:
    """Damage to a copy of the images, options for packing, and overrides of the training configuration."""

    damage: Callable[[Path], None] = lambda images: None
    options: PackOptions = field(default_factory=lambda: PackOptions(tile_px=TILE_PX))
    overrides: dict[str, object] = field(default_factory=dict)
    validate_on_whole: bool = False
    """Use the validation split of the run without fault, not the fault's own."""


def move_masks(images: Path) -> None:
    """Shift every mask, as if it belonged to another version of the image."""
    for path in images.glob("*_mask.png"):
        Image.fromarray(np.roll(np.asarray(Image.open(path)), MASK_SHIFT_PX, axis=1)).save(path)


def exchange_bands(images: Path) -> None:
    """Exchange red and near infrared in every second image, as if two cameras numbered their bands differently."""
    for path in sorted(images.glob("*.tif"))[::2]:
        with rasterio.open(path, "r+") as image:
            image.write(image.read()[[0, 1, 4, 3, 2]])


def keep_three(images: Path) -> None:
    """Keep three images, one for each split."""
    for path in sorted(images.glob("*.tif"))[3:]:
        path.unlink()


FAULTS = {
    "whole": Fault(),
    "rate": Fault(overrides={"optim.lr": 0.1}),
    "soil": Fault(options=PackOptions(tile_px=TILE_PX, mask="ndvi<0.25")),
    "moved": Fault(damage=move_masks),
    "bands": Fault(damage=exchange_bands),
    "few": Fault(damage=keep_three, validate_on_whole=True),
    "empty": Fault(options=PackOptions(tile_px=TILE_PX, min_coverage=0.0, mask="ndvi>0.3", erode_px=24)),
}


def rows(path: Path) -> Rows:
    """Return the rows of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(name: str, fault: Fault, folder: Path, steps: int) -> Path:
    """Damage a copy of the images, pack it, train on it, and return the folder of the run."""
    images, shards, out = (folder / name / part for part in ("images", "shards", "run"))
    shutil.copytree(folder / "images", images)
    fault.damage(images)
    pack([images], shards, fault.options)
    values = {
        "data.train": shards / "train",
        "data.val": (folder / "whole" / "shards" if fault.validate_on_whole else shards) / "val",
        "train.max_steps": steps,
        "train.eval_every": steps // 12,
        "train.checkpoint_every": 0,
        "out": out,
        **fault.overrides,
    }
    overrides = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    subprocess.run([*LAUNCHER, *overrides], check=True, stdout=subprocess.DEVNULL)
    return out


def draw(whole: Path, broken: Path) -> Figure:
    """Draw four curves of a broken run over the curves of the run without a fault."""
    figure = Figure(figsize=(11, 2.5), layout="constrained")
    panels = figure.subplots(1, 4)
    for out, colour, label in ((whole, LEAF, "whole"), (broken, RECON, "broken")):
        logged, validated = rows(out / "metrics.jsonl"), rows(out / "validation.jsonl")
        steps, validation_steps = [row["step"] for row in logged], [row["step"] for row in validated]
        panels[0].plot(steps, smooth([row["loss"] for row in logged]), color=colour, label=label)
        panels[1].plot(steps, smooth([row["coverage"] for row in logged]), color=colour)
        panels[1].fill_between(
            steps,
            [row["coverage_min"] for row in logged],
            [row["coverage_max"] for row in logged],
            color=colour,
            alpha=0.12,
            linewidth=0,
        )
        panels[2].plot(validation_steps, [row["angle_deg"] for row in validated], "o-", color=colour, markersize=3)
        panels[3].plot(validation_steps, [row["ndvi_mae"] for row in validated], "o-", color=colour, markersize=3)
    titles = ("train/loss", "train_coverage: mean, min to max", "validation/angle_deg", "validation/ndvi_mae")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("log")
    for axes in panels[2:]:
        axes.set_ylim(bottom=0)
    panels[1].set_ylim(0, 1)
    panels[0].legend(frameon=False)
    return figure


def smooth(values: list[float]) -> np.ndarray:
    """Return the moving average over neighbouring steps, over fewer at both ends."""
    kernel = np.ones(SMOOTH_STEPS)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def main() -> None:
    """Train without and with every fault, and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for curves-NAME.png")
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        synthesise(folder / "images", num_images=16, size_px=256, seed=5)
        runs = {name: train(name, fault, folder, arguments.steps) for name, fault in FAULTS.items()}
        for name in FAULTS:
            if name != "whole":
                draw(runs["whole"], runs[name]).savefig(arguments.out / f"curves-{name}.png", dpi=90)
                last = rows(runs[name] / "validation.jsonl")[-1]
                print(name, {key: round(last[key], 4) for key in ("psnr_db", "angle_deg", "ndvi_mae")})


if __name__ == "__main__":
    main()
