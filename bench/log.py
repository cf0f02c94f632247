"""Measure the cost of logging every step, relative to a step of an SD3-size VAE in the same run.

python bench/log.py [--px 128] [--batch 2] [--steps 3] [--full]

A logged step writes one line and about forty numbers, and measures the distance of the weights from their average.
A thread draws pictures while training goes on, so their time is printed relative to a step, too.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from step import BANDS, SD3, WIDTH
from steps import ours

from msvae import AutoencoderKLMultispectralAdapter
from msvae.bands import Bands
from msvae.config import Config, DataConfig, OptimConfig
from msvae.distributed.precision import AutocastModel
from msvae.distributed.setup import join_ranks
from msvae.report.composites import Example
from msvae.report.pictures import comparison_figure
from msvae.training.optim import make_optimizer
from msvae.training.pace import Pace
from msvae.training.run_log import RunLog
from msvae.training.step import loss_row, optimizer_row
from msvae.training.trained_weights import ReplicatedWeights

TERMS = ("mse", "sam", "kl")


def median_s(act: Callable[[], object], times: int) -> float:
    """Return the median duration of a call, after one call that is not counted."""
    act()
    durations_s = []
    for _ in range(times):
        began_s = time.perf_counter()
        act()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        durations_s.append(time.perf_counter() - began_s)
    return statistics.median(durations_s)


def one_step(arguments: argparse.Namespace, device: torch.device) -> Callable[[], None]:
    """Return a function that runs one step without logging."""
    tiles = torch.rand(arguments.batch, BANDS, arguments.px, arguments.px, device=device)
    leaf_mask = torch.rand(arguments.batch, 1, arguments.px, arguments.px, device=device) > 0.4
    step = ours.make_step(SD3, ["eager"], WIDTH, arguments.full, device, "no", arguments.batch)
    return lambda: step(tiles, leaf_mask)


def distance(full: bool, device: torch.device) -> Callable[[], torch.Tensor]:
    """Return a function that measures the squared distance of the weights from their average."""
    model = AutoencoderKLMultispectralAdapter(**SD3, adapter_width=WIDTH)
    if not full:
        model.freeze_backbone()
    model.to(device)
    optimizer = make_optimizer(model, OptimConfig())
    return ReplicatedWeights(join_ranks(), AutocastModel(model, "no"), optimizer, 1.0).squared_norms


def row_and_line(log: RunLog, batch: int, device: torch.device) -> Callable[[], None]:
    """Return a function that turns the reduced sums of a step into lines of the log files and the terminal."""
    config, bands = Config(data=DataConfig(global_batch_size=batch)), Bands()
    of_bands = {"mse": torch.rand(BANDS, dtype=torch.float64, device=device)}
    one = torch.ones((), dtype=torch.float64, device=device)
    totals = {term: of_bands.get(term, one) for term in TERMS}
    counts = {term: torch.ones_like(total) for term, total in totals.items()}
    counts |= {name: one for name in ("valid_pixels", "total_pixels", "nonfinite_elements")}
    counts |= {name: torch.full((batch,), 0.5, device=device) for name in ("tile_coverage", "bad_slots")}
    pace, number = Pace(join_ranks(), batch, 0), iter(range(1, 1_000_000))

    def write() -> None:
        step = next(number)
        pace.add(counts)
        rows = loss_row(config, bands, totals, counts, 1), optimizer_row(config, 1.0, 1.0, torch.ones(2))
        log.step({"step": step, "epoch": 1.0, **rows[0], **rows[1], "skipped_steps": 0, **pace.row(step)})

    return write


def draw(px: int) -> None:
    """Draw the largest picture of an evaluation."""
    random = np.random.default_rng(0)
    tiles = random.random((4, 2, BANDS, px, px), np.float32)
    examples = [Example(str(i), *tile, tile[0, 0] > 0.4) for i, tile in enumerate(tiles)]
    FigureCanvasAgg(comparison_figure(examples, Bands())).draw()


def main() -> None:
    """Measure and print shares of a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("px", 128), ("batch", 2), ("steps", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--full", action="store_true", help="train the backbone, too")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    step_s = median_s(one_step(arguments, device), arguments.steps)
    distance_s = median_s(distance(arguments.full, device), arguments.steps)
    with tempfile.TemporaryDirectory() as folder:
        log = RunLog(Path(folder), -1, 10**9, evaluated=False)
        row_s = median_s(row_and_line(log, arguments.batch, device), 200)
        log.close()
    picture_s = median_s(lambda: draw(arguments.px), 3)
    print(f"a step                    {step_s:8.3f} s")
    print(f"row, line and scalars     {row_s / step_s:8.2%} of a step")
    print(f"distance to the average   {distance_s / step_s:8.2%} of a step")
    print(f"a picture, in a thread    {picture_s / step_s:8.2%} of a step")


if __name__ == "__main__":
    main()
