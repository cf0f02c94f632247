"""What limits a run on 8 to 4,096 GPUs, on paper: the tables of docs/scale.md.

python bench/scale.py [--peak_tflops 989] [--mfu 0.3] [--node_gbit 400] [--tile_px 256] [--micro_batch 8]

Sizes of the model and of its work are counted, the schedule of reads is simulated by msvae.shards.schedule, and what
belongs to a cluster is assumed: give your own, which `msvae doctor` and bench/step.py measure.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from step import SD3, flop

from msvae.leaf_statistics import LeafStatistics
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.packing.options import PackOptions
from msvae.shards.manifest import Manifest, ShardEntry, Shards
from msvae.shards.schedule import Cluster, Schedule, simulate

GPUS = (8, 64, 512, 4096)
GPUS_A_NODE = 8
NODE_GBIT = (25, 100, 400)
HOP_S = 20e-6
"""One message between machines through NCCL, assumed."""
NVLINK_BYTES_A_S = 450e9
"""Of one H100, each way."""
BACKWARD_SHARE = 2 / 3
"""Of a step that trains everything: the forward pass is the other third."""
GETS_A_S_AND_PREFIX = 5500
"""That S3 promises."""
GPU_HOURS_BETWEEN_FAILURES = 16384 * 54 * 24 / 419
"""Of one GPU with its share of machine and network: 419 interruptions of 16,384 GPUs in 54 days (Llama 3, 2024)."""
HOST_BYTES_A_S = 25e9
"""From a GPU to its machine's memory."""
STORE_BYTES_A_S = 1e9
"""One machine to an object store or shared disk."""
RESTART_S = 300.0
"""From a failure to the first new step: scheduler, launch, checkpoint, first batch."""
FLOAT_BYTES, COPIES_OF_TRAINED = 4, 4
TILES, TILES_A_SHARD = 20_000_000, PackOptions().tiles_per_shard
TILE_OVERHEAD_BYTES = 2942
"""Tar headers, padding, metadata and a small mask: about what shards of msvae spend on a sample."""
STEPS = 20


@lru_cache
def parameters() -> tuple[int, int]:
    """All of the SD3 VAE with adapters, and those of the adapters and attention alone."""
    with torch.device("meta"):
        model = AutoencoderKLMultispectralAdapter(**SD3)
    every = sum(parameter.numel() for parameter in model.parameters())
    model.freeze_backbone()
    return every, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def all_reduce_s(num_bytes: float, gpus: int, node_gbit: float) -> float:
    """NVLink within machines, the network between them: bytes over bandwidth, and hops up and down a tree."""
    nodes, here = max(1, gpus // GPUS_A_NODE), min(gpus, GPUS_A_NODE)
    within_s = 2 * (here - 1) / here * num_bytes / NVLINK_BYTES_A_S
    between_s = 2 * (nodes - 1) / nodes * num_bytes / (node_gbit * 1e9 / 8)
    return within_s + between_s + 2 * math.log2(nodes) * HOP_S


def gradient_rows(asked: argparse.Namespace) -> Iterator[list[str]]:
    """The all-reduce as a share of the backward pass that hides it, and the efficiency that is left."""
    every, adapters = parameters()
    for gpus in GPUS:
        row = [f"{gpus:,}"]
        for node_gbit in NODE_GBIT:
            row += [_hidden(every, True, gpus, node_gbit, asked)]
        yield [*row, _hidden(adapters, False, gpus, NODE_GBIT[0], asked)]


def _hidden(trained: int, full: bool, gpus: int, node_gbit: float, asked: argparse.Namespace) -> str:
    micro_batch_s = micro_batch_work(full, asked) / (asked.peak_tflops * 1e12 * asked.mfu)
    backward_s = micro_batch_s * (BACKWARD_SHARE if full else 1 / 2)
    reduce_s = all_reduce_s(FLOAT_BYTES * trained, gpus, node_gbit)
    efficiency = micro_batch_s / (micro_batch_s + max(0.0, reduce_s - backward_s))
    return f"{reduce_s / backward_s:.2g} ({efficiency:.0%})"


def micro_batch_work(full: bool, asked: argparse.Namespace) -> float:
    """Floating-point operations of a micro batch."""
    return asked.micro_batch * tile_work(full, asked.tile_px)


@lru_cache
def tile_work(full: bool, tile_px: int) -> float:
    """Floating-point operations of one tile, forward and backward; proportional to its pixels but for attention."""
    return flop(full, tile_px, 1)


def tile_bytes(asked: argparse.Namespace) -> int:
    """Of a sample of five bands of 16 bits in its tar."""
    return 5 * asked.tile_px**2 * 2 + TILE_OVERHEAD_BYTES


def data_rows(asked: argparse.Namespace) -> Iterator[list[str]]:
    """Requests and bytes a second of all GPUs together, at the speed of computing."""
    for gpus in GPUS:
        tiles_a_s = gpus * asked.peak_tflops * 1e12 * asked.mfu / tile_work(True, asked.tile_px)
        num_bytes = tiles_a_s * tile_bytes(asked)
        node_gbit = num_bytes / max(1, gpus // GPUS_A_NODE) * 8e-9
        yield [
            f"{gpus:,}",
            f"{tiles_a_s / GETS_A_S_AND_PREFIX:.2g}",
            f"{math.ceil(tiles_a_s / GETS_A_S_AND_PREFIX):,}",
            f"{num_bytes / 1e9:,.3g}",
            f"{node_gbit:.2g}",
            f"{node_gbit / asked.node_gbit:.1%}",
        ]


def schedule_rows(asked: argparse.Namespace) -> Iterator[list[str]]:
    """What `msvae simulate` says of a node."""
    for gpus in GPUS:
        schedule = followed(gpus, asked)
        yield [
            f"{gpus:,}",
            f"{gpus * asked.micro_batch:,}",
            f"{schedule.step_bytes.mean() / tile_bytes(asked):,.0f}",
            f"{schedule.step_shards.mean():,.0f}",
            f"{schedule.step_bytes.mean() / 1e6:,.0f}",
            f"{schedule.node_cache_bytes.max() / 1e9:,.0f}",
            f"{schedule.steps_an_epoch:,.0f}",
        ]


def followed(gpus: int, asked: argparse.Namespace) -> Schedule:
    """Some steps of a run on a data set of twenty million tiles."""
    cluster = Cluster(max(1, gpus // GPUS_A_NODE), GPUS_A_NODE, gpus * asked.micro_batch, asked.micro_batch)
    return simulate(manifest(TILES // TILES_A_SHARD, asked), cluster, seed=0, num_steps=STEPS)


def manifest(num_shards: int, asked: argparse.Namespace) -> Manifest:
    """Of shards that nobody has written."""
    ones, pairs = [1.0] * 5, [[0.0] * 5] * 5
    size_bytes = TILES_A_SHARD * tile_bytes(asked)
    return Manifest(
        band_names=["blue", "green", "red", "red_edge", "nir"],
        wavelengths_nm=[475, 560, 668, 717, 840],
        dtype="uint16",
        tile_px=asked.tile_px,
        scale=ones,
        offset=ones,
        statistics=LeafStatistics(
            num_pixels=1, mean=ones, std=ones, minimum=ones, maximum=ones, covariance=pairs, percentiles={}
        ),
        shards=Shards.of(
            ShardEntry(f"leaf-{shard:06d}.tar", TILES_A_SHARD, size_bytes, f"{shard:064x}")
            for shard in range(num_shards)
        ),
    )


def failure_rows(asked: argparse.Namespace) -> Iterator[list[str]]:
    """Checkpoints of everything against failures: Young (1974), interval = sqrt(2 x cost x time between failures)."""
    num_bytes = FLOAT_BYTES * COPIES_OF_TRAINED * parameters()[0]
    cost_s, written_s = num_bytes / HOST_BYTES_A_S, num_bytes / STORE_BYTES_A_S
    step_s = micro_batch_work(True, asked) / (asked.peak_tflops * 1e12 * asked.mfu)
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


def start_rows(asked: argparse.Namespace) -> Iterator[list[str]]:
    """What all ranks together ask of the place of the shards and of the weights before the first step."""
    manifest_bytes = len(manifest(TILES // TILES_A_SHARD, asked).model_dump_json())
    weights_bytes = FLOAT_BYTES * parameters()[0]
    for gpus in GPUS:
        nodes = max(1, gpus // GPUS_A_NODE)
        yield [
            f"{gpus:,}",
            f"{gpus * manifest_bytes / 1e9:,.2f} GB",
            f"{gpus * weights_bytes / 1e9:,.0f} GB",
            f"{nodes * weights_bytes / 1e9:,.1f} GB",
            f"{all_reduce_s(weights_bytes, gpus, asked.node_gbit) / 2 * 1e3:,.0f} ms",
        ]


def table(heads: Sequence[str], rows: Iterator[list[str]]) -> str:
    """In Markdown."""
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(asked: argparse.Namespace) -> Iterator[str]:
    """All of them, in the order of the document."""
    networks = [f"all trained, {gbit} Gbit/s a node" for gbit in NODE_GBIT]
    yield table(["GPUs", *networks, f"adapters alone, {NODE_GBIT[0]} Gbit/s"], gradient_rows(asked))
    yield table(
        ["GPUs", "requests / 5,500 a s", "prefixes", "GB/s, all", "Gbit/s, a node", f"of {asked.node_gbit:g} Gbit/s"],
        data_rows(asked),
    )
    yield table(
        ["GPUs", "global batch", "requests", "shards", "MB a step", "GB of cache, whole shards", "steps an epoch"],
        schedule_rows(asked),
    )
    yield table(
        ["GPUs", "between failures", "best interval", "in steps", "lost", "lost, every 500 steps", "of that restarts"],
        failure_rows(asked),
    )
    yield table(
        ["GPUs", "manifests", "weights, every rank", "weights, once a node", "sending weights to all"],
        start_rows(asked),
    )


def _rounded(steps: float) -> int:
    """To one digit, as one would set it."""
    digit = 10 ** max(0, math.floor(math.log10(steps)))
    return round(steps / digit) * digit


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of a GPU in the precision of the run")
    parser.add_argument("--mfu", type=float, default=0.3, help="share of it that a step reaches")
    parser.add_argument("--node_gbit", type=float, default=400.0, help="of the network, a node")
    parser.add_argument("--tile_px", type=int, default=256)
    parser.add_argument("--micro_batch", type=int, default=8)
    print("\n\n".join(tables(parser.parse_args())))


if __name__ == "__main__":
    main()
