"""Measure weak scaling of a training run, and the parts of a step, with an SD3-size VAE at 128 px.

python bench/scaling.py [--processes 2] [--steps 8] [--rounds 3] [--full] [--config_file configs/accelerate/cpu.yaml]

Three cases take turns, with one thread per process: one process, one run of N processes, and N independent runs.
Efficiency is the duration of a step of one process divided by its duration in the run of N. The independent runs are
the limit, because cores share memory bandwidth.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from diffusers import AutoencoderKL
from step import SD3

from msvae.packing.options import PackOptions
from msvae.packing.pack import pack
from msvae.synthetic.images import synthesise

HERE = Path(__file__).resolve().parent
TILE_PX = 128
CPU_CONFIG = str(HERE.parent / "configs" / "accelerate" / "cpu.yaml")
Figures = dict[str, float]


def prepare(folder: Path) -> None:
    """Write a backbone with random weights, and shards of synthetic leaves."""
    AutoencoderKL(**SD3).save_pretrained(folder / "backbone")
    synthesise(folder / "images", num_images=6, size_px=512, seed=1)
    pack([folder / "images"], folder / "shards", PackOptions(tile_px=TILE_PX))


def launch(
    folder: Path, name: str, num_processes: int, checkpoint_every: int, arguments: argparse.Namespace
) -> subprocess.Popen[bytes]:
    """Start a new run in FOLDER/NAME, which writes its figures to FOLDER/NAME.json."""
    shutil.rmtree(folder / name, ignore_errors=True)
    values = {
        "model.pretrained": folder / "backbone",
        "model.train_backbone": "all" if arguments.full else "none",
        "data.train": folder / "shards" / "train",
        "data.val": "null",
        "data.global_batch_size": num_processes,
        "data.micro_batch_size": 1,
        "train.max_steps": arguments.steps,
        "train.checkpoint_every": checkpoint_every,
        "out": folder / name,
    }
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", arguments.config_file]
    overrides = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    script = [str(HERE / "steps" / "timed_train.py"), str(folder / f"{name}.json"), *overrides]
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [*launcher, "--num_processes", str(num_processes), *script],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.DEVNULL,
    )


def measure(folder: Path, names: list[str], num_processes: int, arguments: argparse.Namespace) -> list[Figures]:
    """Run one training for each name at the same time, and return their figures."""
    return figures(folder, {name: launch(folder, name, num_processes, 3, arguments) for name in names})


def figures(folder: Path, runs: Mapping[str, subprocess.Popen[bytes]]) -> list[Figures]:
    """Wait for launched runs and return their figures."""
    if any([run.wait() for run in runs.values()]):
        raise SystemExit("a training run failed; see its error above")
    return [json.loads((folder / f"{name}.json").read_text()) for name in runs]


def main() -> None:
    """Measure in turns and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="train the backbone, too")
    parser.add_argument("--config_file", default=CPU_CONFIG)
    arguments = parser.parse_args()
    alone: list[Figures] = []
    together: list[Figures] = []
    independent: list[Figures] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        for _ in range(arguments.rounds):
            alone += measure(folder, ["alone"], 1, arguments)
            together += measure(folder, ["together"], arguments.processes, arguments)
            independent += measure(
                folder, [f"independent{number}" for number in range(arguments.processes)], 1, arguments
            )
    steps = [statistics.median(f["step"] for f in found) for found in (alone, together, independent)]
    efficiencies = f"together {steps[0] / steps[1]:.3f}, independent {steps[0] / steps[2]:.3f}"
    print(f"efficiency of {arguments.processes} processes: {efficiencies}")
    print(f"{'share of a step':>36} {'alone':>8} {'together':>9}")
    for part in alone[0]:
        shares = [statistics.median(f[part] / f["step"] for f in found) for found in (alone, together)]
        print(f"{part:>36} {shares[0]:8.4f} {shares[1]:9.4f}")


if __name__ == "__main__":
    main()
