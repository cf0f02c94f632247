"""Estimate what limits a run on 8 to 4,096 GPUs. Prints the tables of docs/scale.md.

python bench/scale.py [--peak_tflops 989] [--mfu 0.3] [--node_gbit 400] [--tile_px 256] [--micro_batch 8]

Parameters and floating-point operations are counted, reads are simulated by msvae.shards.schedule, and numbers of the
cluster are assumed. Replace them by your own, which `msvae doctor` and bench/step.py measure.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from step import SD3, flop

from msvae.bands import LeafStatistics
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.packing.options import PackOptions
from msvae.shards.manifest import Manifest, ShardEntry, Shards
from msvae.shards.schedule import Cluster, Schedule, simulate

GPUS = (8, 64, 512, 4096)
GPUS_PER_NODE = 8
NODE_GBIT = (25, 100, 400)
HOP_S = 20e-6
"""Assumed latency of one message between machines through NCCL, in seconds."""
NVLINK_BYTES_PER_S = 450e9
"""Bandwidth of one H100 in each direction."""
BACKWARD_SHARE = 2 / 3
"""Share of the backward pass in a step that trains everything; the forward pass is the other third."""
GETS_PER_S_AND_PREFIX = 5500
"""GET requests per second that S3 allows for one prefix."""
GPU_HOURS_BETWEEN_FAILURES = 16384 * 54 * 24 / 419
"""Hours between failures of one GPU with its share of machine and network: 419 interruptions of 16,384 GPUs in 54 days
(Llama 3, 2024)."""
HOST_BYTES_PER_S = 25e9
"""Bandwidth from a GPU to the memory of its machine."""
STORE_BYTES_PER_S = 1e9
"""Bandwidth from one machine to an object store or shared disk."""
RESTART_S = 300.0
"""Time from a failure to the first new step: scheduler, launch, checkpoint, first batch."""
FLOAT_BYTES, COPIES_OF_TRAINED = 4, 4
TILES, TILES_PER_SHARD = 20_000_000, PackOptions().tiles_per_shard
TILE_OVERHEAD_BYTES = 2942
"""Bytes of a sample in addition to its pixels, about: tar headers, padding, metadata and a small mask."""
STEPS = 20


@lru_cache
def parameters() -> tuple[int, int]:
    """Count the parameters of the SD3 VAE with adapters, and those of adapters and attention alone."""
    with torch.device("meta"):
        model = AutoencoderKLMultispectralAdapter(**SD3)
    every = sum(parameter.numel() for parameter in model.parameters())
    model.freeze_backbone()
    return every, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def all_reduce_s(num_bytes: float, gpus: int, node_gbit: float) -> float:
    """Estimate an all-reduce over NVLink within machines and the network between them.

    The time is bytes over bandwidth, plus the latency of messages up and down a tree.
    """
    nodes, here = max(1, gpus // GPUS_PER_NODE), min(gpus, GPUS_PER_NODE)
    within_s = 2 * (here - 1) / here * num_bytes / NVLINK_BYTES_PER_S
    between_s = 2 * (nodes - 1) / nodes * num_bytes / (node_gbit * 1e9 / 8)
    return within_s + between_s + 2 * math.log2(nodes) * HOP_S


def gradient_rows(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the all-reduce as a share of the backward pass that hides it, and the remaining efficiency."""
    every, adapters = parameters()
    for gpus in GPUS:
        row = [f"{gpus:,}"]
        for node_gbit in NODE_GBIT:
            row += [_hidden(every, True, gpus, node_gbit, arguments)]
        yield [*row, _hidden(adapters, False, gpus, NODE_GBIT[0], arguments)]


def _hidden(trained: int, full: bool, gpus: int, node_gbit: float, arguments: argparse.Namespace) -> str:
    micro_batch_s = micro_batch_work(full, arguments) / (arguments.peak_tflops * 1e12 * arguments.mfu)
    backward_s = micro_batch_s * (BACKWARD_SHARE if full else 1 / 2)
    reduce_s = all_reduce_s(FLOAT_BYTES * trained, gpus, node_gbit)
    efficiency = micro_batch_s / (micro_batch_s + max(0.0, reduce_s - backward_s))
    return f"{reduce_s / backward_s:.2g} ({efficiency:.0%})"


def micro_batch_work(full: bool, arguments: argparse.Namespace) -> float:
    """Return the floating-point operations of a micro batch."""
    return arguments.micro_batch * tile_work(full, arguments.tile_px)


@lru_cache
def tile_work(full: bool, tile_px: int) -> float:
    """Return the floating-point operations of one tile, forward and backward.

    They are proportional to the number of pixels, except for attention.
    """
    return flop(full, tile_px, 1)


def tile_bytes(arguments: argparse.Namespace) -> int:
    """Return the bytes of a sample with five bands of 16 bits in its tar."""
    return 5 * arguments.tile_px**2 * 2 + TILE_OVERHEAD_BYTES


def data_rows(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Yield requests and bytes per second of all GPUs together, at the speed of computing."""
    for gpus in GPUS:
        tiles_per_s = gpus * arguments.peak_tflops * 1e12 * arguments.mfu / tile_work(True, arguments.tile_px)
        num_bytes = tiles_per_s * tile_bytes(arguments)
        node_gbit = num_bytes / max(1, gpus // GPUS_PER_NODE) * 8e-9
        yield [
            f"{gpus:,}",
            f"{tiles_per_s / GETS_PER_S_AND_PREFIX:.2g}",
            f"{math.ceil(tiles_per_s / GETS_PER_S_AND_PREFIX):,}",
            f"{num_bytes / 1e9:,.3g}",
            f"{node_gbit:.2g}",
            f"{node_gbit / arguments.node_gbit:.1%}",
        ]


def schedule_rows(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the reads of one node, as `msvae simulate` shows them."""
    for gpus in GPUS:
        schedule = simulated(gpus, arguments)
        yield [
            f"{gpus:,}",
            f"{gpus * arguments.micro_batch:,}",
            f"{schedule.step_bytes.mean() / tile_bytes(arguments):,.0f}",
            f"{schedule.step_shards.mean():,.0f}",
            f"{schedule.step_bytes.mean() / 1e6:,.0f}",
            f"{schedule.node_cache_bytes.max() / 1e9:,.0f}",
            f"{schedule.steps_per_epoch:,.0f}",
        ]


def simulated(gpus: int, arguments: argparse.Namespace) -> Schedule:
    """Simulate some steps of a run on a dataset of twenty million tiles."""
    cluster = Cluster(
        max(1, gpus // GPUS_PER_NODE), GPUS_PER_NODE, gpus * arguments.micro_batch, arguments.micro_batch
    )
    return simulate(manifest(TILES // TILES_PER_SHARD, arguments), cluster, seed=0, num_steps=STEPS)


def manifest(num_shards: int, arguments: argparse.Namespace) -> Manifest:
    """Return the manifest of shards that do not exist."""
    ones, pairs = [1.0] * 5, [[0.0] * 5] * 5
    size_bytes = TILES_PER_SHARD * tile_bytes(arguments)
    return Manifest(
        band_names=["blue", "green", "red", "red_edge", "nir"],
        wavelengths_nm=[475, 560, 668, 717, 840],
        dtype="uint16",
        tile_px=arguments.tile_px,
        scale=ones,
        offset=ones,
        statistics=LeafStatistics(
            num_pixels=1, mean=ones, std=ones, minimum=ones, maximum=ones, covariance=pairs, percentiles={}
        ),
        shards=Shards.of(
            ShardEntry(f"leaf-{shard:06d}.tar", TILES_PER_SHARD, size_bytes, f"{shard:064x}")
            for shard in range(num_shards)
        ),
    )


def failure_rows(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the best checkpoint interval and the lost time, if everything is trained.

    Young (1974): interval = sqrt(2 x cost x time between failures).
    """
    num_bytes = FLOAT_BYTES * COPIES_OF_TRAINED * parameters()[0]
    cost_s, written_s = num_bytes / HOST_BYTES_PER_S, num_bytes / STORE_BYTES_PER_S
    step_s = micro_batch_work(True, arguments) / (arguments.peak_tflops * 1e12 * arguments.mfu)
    for gpus in GPUS:
        between_s = GPU_HOURS_BETWEEN_FAILURES * 3600 / gpus
        interval_s = max(math.sqrt(2 * cost_s * between_s), written_s)
        lost = cost_s / interval_s + (interval_s / 2 + RESTART_S) / between_s
        every_500 = cost_s / (500 * step_s) + (250 * step_s + RESTART_S) / between_s
        yield [
            f"{gpus:,}",
            f"{between_s / 3600:,.0f} h",
            f"{interval_s / 60:,.0f} min",
            f"{_rounded(interval_s / step_s):,}",
            f"{lost:.2%}",
            f"{every_500:.2%}",
            f"{RESTART_S / between_s:.2%}",
        ]


def start_rows(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Yield the bytes that all ranks together read before the first step: manifests and weights."""
    manifest_bytes = len(manifest(TILES // TILES_PER_SHARD, arguments).model_dump_json())
    weights_bytes = FLOAT_BYTES * parameters()[0]
    for gpus in GPUS:
        nodes = max(1, gpus // GPUS_PER_NODE)
        yield [
            f"{gpus:,}",
            f"{gpus * manifest_bytes / 1e9:,.2f} GB",
            f"{gpus * weights_bytes / 1e9:,.0f} GB",
            f"{nodes * weights_bytes / 1e9:,.1f} GB",
            f"{all_reduce_s(weights_bytes, gpus, arguments.node_gbit) / 2 * 1e3:,.0f} ms",
        ]


def table(heads: Sequence[str], rows: Iterator[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(arguments: argparse.Namespace) -> Iterator[str]:
    """Yield all tables, in the order of docs/scale.md."""
    networks = [f"all trained, {gbit} Gbit/s per node" for gbit in NODE_GBIT]
    yield table(["GPUs", *networks, f"adapters only, {NODE_GBIT[0]} Gbit/s"], gradient_rows(arguments))
    yield table(
        [
            "GPUs",
            "requests/s / 5,500",
            "prefixes",
            "GB/s, all",
            "Gbit/s per node",
            f"of {arguments.node_gbit:g} Gbit/s",
        ],
        data_rows(arguments),
    )
    yield table(
        ["GPUs", "global batch", "requests", "shards", "MB per step", "GB of cache, whole shards", "steps per epoch"],
        schedule_rows(arguments),
    )
    yield table(
        ["GPUs", "between failures", "best interval", "in steps", "lost", "lost, every 500 steps", "lost to restarts"],
        failure_rows(arguments),
    )
    yield table(
        ["GPUs", "manifests", "weights, every rank", "weights, one rank per node", "broadcast of weights"],
        start_rows(arguments),
    )


def _rounded(steps: float) -> int:
    """Round to one significant digit, as a user would set it."""
    digit = 10 ** max(0, math.floor(math.log10(steps)))
    return round(steps / digit) * digit


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--peak_tflops", type=float, default=989.0, help="peak TFLOP/s of a GPU in the precision of the run"
    )
    parser.add_argument("--mfu", type=float, default=0.3, help="share of the peak that a step reaches")
    parser.add_argument("--node_gbit", type=float, default=400.0, help="bandwidth of the network per node, in Gbit/s")
    parser.add_argument("--tile_px", type=int, default=256)
    parser.add_argument("--micro_batch", type=int, default=8)
    print("\n\n".join(tables(parser.parse_args())))


if __name__ == "__main__":
    main()
