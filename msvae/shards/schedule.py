"""Simulate the reads of each node of a cluster during training, from the manifest alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from msvae.messages import counted
from msvae.shards.manifest import Manifest
from msvae.shards.order import SHUFFLE_WINDOW_SHARDS, permutation


@dataclass(frozen=True)
class Cluster:
    """Size of a cluster and of its batches.

    Raises: ValueError if the global batch cannot be divided evenly among the GPUs and micro batches.
    """

    num_nodes: int
    gpus_per_node: int
    global_batch_size: int
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        ranks, micro = self.world_size, self.micro_batch_size or 1
        if self.global_batch_size % (ranks * micro):
            least = ranks * micro
            raise ValueError(
                f"global batch {self.global_batch_size} cannot be divided among {ranks} GPUs in micro batches of "
                f"{micro}; use a multiple of {least}, such as {max(1, round(self.global_batch_size / least)) * least}"
            )

    @property
    def world_size(self) -> int:
        """Number of GPUs, each of which is one rank."""
        return self.num_nodes * self.gpus_per_node


@dataclass(frozen=True)
class Schedule:
    """Reads in the first steps of an epoch, as arrays over steps, nodes or ranks.

    The bytes of a sample are the size of its tar, including headers and padding, divided by the samples in the tar.
    """

    num_shards: int
    num_steps: int
    steps_per_epoch: float
    rank_samples: NDArray[np.int64]
    """(ranks,): samples that a rank reads in all these steps."""
    step_bytes: NDArray[np.float64]
    """(steps, nodes): bytes that a node reads."""
    step_shards: NDArray[np.int64]
    """(steps, nodes): distinct shards that a node reads from. This is its number of requests if all requests to one
    shard are joined."""
    step_indexes: NDArray[np.int64]
    """(steps, nodes): indexes that the ranks of a node open. A rank opens one when it first reads from a shard."""
    node_shards: NDArray[np.int64]
    """(nodes,): distinct shards that a node reads from in all these steps."""
    node_shard_bytes: NDArray[np.int64]
    """(nodes,): total size of these shards."""
    node_cache_bytes: NDArray[np.int64]
    """(nodes,): largest cache that a node needs in order to download each of these shards whole and only once."""


def shuffle_windows(
    samples_per_shard: NDArray[np.int64], seed: int, window_shards: int = SHUFFLE_WINDOW_SHARDS
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield shard and row of all training samples, one shuffle window at a time, epoch after epoch, without end.

    This is the sequence of `SampleOrder`, computed with whole arrays.
    """
    for epoch in count():
        shards = permutation(len(samples_per_shard), seed, epoch)
        for window, start in enumerate(range(0, len(shards), window_shards)):
            chosen = shards[start : start + window_shards]
            sizes = samples_per_shard[chosen]
            rows = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            mixed = permutation(len(rows), seed, epoch, window)
            yield np.repeat(chosen, sizes)[mixed], rows[mixed]


def simulate(manifest: Manifest, cluster: Cluster, *, seed: int, num_steps: int) -> Schedule:
    """Simulate the reads of `num_steps` steps, at most one epoch.

    Raises: ValueError if an epoch has fewer samples than a global batch.
    """
    sizes, size_bytes = (
        np.array(column, np.int64) for column in (manifest.shards.num_samples, manifest.shards.size_bytes)
    )
    batch, nodes = cluster.global_batch_size, cluster.num_nodes
    if batch > sizes.sum():
        raise ValueError(
            f"global batch {batch:,} is more than the {counted(int(sizes.sum()), 'tile')} of the dataset, so every "
            "step would read some tiles several times; give a smaller global batch, or pack more tiles"
        )
    steps_per_epoch = sizes.sum() / batch
    steps = min(num_steps, int(steps_per_epoch))
    sample_bytes = size_bytes / np.maximum(sizes, 1)
    rank_samples = np.zeros(cluster.world_size, np.int64)
    step_bytes = np.zeros(steps * nodes)
    step_shards, step_indexes = np.zeros(steps * nodes, np.int64), np.zeros(steps * nodes, np.int64)
    held_SN, node_shards = np.zeros((steps + 1, nodes), np.int64), np.zeros(nodes, np.int64)
    node_shard_bytes = np.zeros(nodes, np.int64)
    start = 0
    for shards, _ in shuffle_windows(sizes, seed):
        shards = shards[: steps * batch - start]
        positions = np.arange(start, start + len(shards))
        ranks = positions % batch // (batch // cluster.world_size)
        cells = positions // batch * nodes + ranks // cluster.gpus_per_node
        rank_samples += np.bincount(ranks, minlength=len(rank_samples))
        step_bytes += np.bincount(cells, sample_bytes[shards], len(step_bytes))
        # a shard is in one shuffle window only, so a first read in a window is a first read in the epoch
        _, first_touches = np.unique(ranks * len(sizes) + shards, return_index=True)
        step_indexes += np.bincount(cells[first_touches], minlength=len(step_indexes))
        visits = _distinct(cells, shards)
        step_shards += np.bincount(visits[0], minlength=len(step_shards))
        node, shard, first, last = _visits_of_nodes(*visits, nodes)
        node_shards += np.bincount(node, minlength=nodes)
        np.add.at(node_shard_bytes, node, size_bytes[shard])
        np.add.at(held_SN, (first, node), size_bytes[shard])
        np.subtract.at(held_SN, (last + 1, node), size_bytes[shard])
        start += len(shards)
        if start == steps * batch:
            break
    return Schedule(
        num_shards=len(sizes),
        num_steps=steps,
        steps_per_epoch=float(steps_per_epoch),
        rank_samples=rank_samples,
        step_bytes=step_bytes.reshape(steps, nodes),
        step_shards=step_shards.reshape(steps, nodes),
        step_indexes=step_indexes.reshape(steps, nodes),
        node_shards=node_shards,
        node_shard_bytes=node_shard_bytes,
        node_cache_bytes=held_SN.cumsum(axis=0).max(axis=0),
    )


def _distinct(cells: NDArray[np.int64], shards: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return each pair of cell and shard once, sorted by cell."""
    span = int(shards.max()) + 1
    pairs = np.unique(cells * span + shards)
    return pairs // span, pairs % span


def _visits_of_nodes(
    cells: NDArray[np.int64], shards: NDArray[np.int64], nodes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return each pair of node and shard once, and the first and last step of its reads. `cells` must be sorted."""
    span = int(shards.max()) + 1
    pairs, steps = cells % nodes * span + shards, cells // nodes
    distinct, first = np.unique(pairs, return_index=True)
    _, last_from_end = np.unique(pairs[::-1], return_index=True)
    return distinct // span, distinct % span, steps[first], steps[len(steps) - 1 - last_from_end]
