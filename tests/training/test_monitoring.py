"""Data that training leaves out, or that looks wrong, is counted and named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from msvae.config import DataConfig
from msvae.shards.order import SampleOrder
from msvae.shards.reader import ShardReader
from msvae.training.monitoring import DataMonitor
from msvae.training.step import coverage_row

GLOBAL_BATCH = 8


@pytest.fixture
def order(leaf_shards) -> SampleOrder:
    return SampleOrder(ShardReader(leaf_shards / "train").samples_per_shard, seed=5)


def counts(coverage: list[float], nonfinite: int = 0) -> dict[str, torch.Tensor]:
    """Return the counts of a global batch of tiles of 1,000 pixels and 5 bands, summed over ranks."""
    tile_coverage = torch.tensor(coverage, dtype=torch.float64)
    pixels = tile_coverage.sum() * 1000
    return {
        "tile_coverage": tile_coverage,
        "bad_slots": torch.zeros(len(coverage), dtype=torch.float64),
        "valid_pixels": pixels,
        "total_pixels": torch.tensor(1000.0 * len(coverage)),
        "leaf_elements": pixels * 5,
        "nonfinite_elements": torch.tensor(float(nonfinite)),
    }


def warnings_of(leaf_shards: Path, order: SampleOrder, batches: dict[int, dict], **config: float) -> list[str]:
    watch = DataMonitor(DataConfig(**config), ShardReader(leaf_shards / "train"), order)
    for step, batch in batches.items():
        watch.add(step, batch)
    said: list[str] = []
    watch.check(said.append)
    watch.check(said.append)
    return said


def key_at(leaf_shards: Path, order: SampleOrder, step: int, slot: int) -> str:
    """Return the key of a tile as it is stored in the shard."""
    reader = ShardReader(leaf_shards / "train")
    (sample,) = order.samples(step - 1, GLOBAL_BATCH, range(slot, slot + 1))
    tile = np.empty(reader.tile_shape, reader.dtype)
    return reader.read_into(sample.shard, sample.row, tile, np.empty(reader.tile_shape[1:], bool))


def test_low_coverage_causes_one_warning_that_names_the_emptiest_tiles(leaf_shards, order):
    sparse = [0.09, 0.05, 0.08, 0.0, 0.09, 0.01, 0.09, 0.09]
    batches = {7: counts([0.5] * 8), 8: counts(sparse), 9: counts([0.09] * 8)}
    (line,) = warnings_of(leaf_shards, order, batches)
    assert "low coverage: 2 of 3 global batches from step 7 to 9 had a leaf share under 0.1" in line
    assert "step 8 has 0.062" in line
    names = [f"{key_at(leaf_shards, order, 8, slot)} ({sparse[slot]:.3f})" for slot in (3, 5, 1)]
    assert line.endswith(f"its emptiest tiles are {', '.join(names)}")


def test_high_coverage_causes_a_warning_that_names_the_fullest_tiles(leaf_shards, order):
    full = [0.97] * 6 + [1.0, 0.98]
    (line,) = warnings_of(leaf_shards, order, {2: counts([0.5] * 8), 3: counts(full)})
    expected = "high coverage: 1 of 2 global batches from step 2 to 3 had a leaf share above 0.95; step 3 has 0.975"
    assert expected in line
    names = [f"{key_at(leaf_shards, order, 3, slot)} ({full[slot]:.3f})" for slot in (6, 7, 0)]
    assert line.endswith(", ".join(names))


def test_coverage_thresholds_are_configurable_and_normal_coverage_causes_no_warning(leaf_shards, order):
    batches = {1: counts([0.5] * 8)}
    assert warnings_of(leaf_shards, order, batches) == []
    assert len(warnings_of(leaf_shards, order, batches, low_coverage=0.6)) == 1
    assert len(warnings_of(leaf_shards, order, batches, high_coverage=0.4)) == 1


def test_values_that_are_not_finite_are_counted_and_too_many_are_an_error(leaf_shards, order):
    batches = {1: counts([0.5] * 8), 2: counts([0.5] * 8, nonfinite=20)}
    assert warnings_of(leaf_shards, order, batches) == [
        "warning: 20 of 40,000 leaf values from step 1 to 2 are not finite and were left out"
    ]
    message = r"20 of 40,000 leaf values from step 1 to 2 are not finite, more than data.max_nonfinite_share 0.0004"
    with pytest.raises(ValueError, match=message):
        warnings_of(leaf_shards, order, batches, max_nonfinite_share=0.0004)


def test_the_log_holds_mean_extremes_and_histogram_of_coverage():
    row = coverage_row(counts([0.0, 0.05, 0.5, 0.55, 1.0]))
    assert row["coverage"] == pytest.approx(0.42)
    assert (row["coverage_min"], row["coverage_max"], row["empty_tiles"]) == (0.0, 1.0, 1)
    assert row["coverage_histogram"] == [2, 0, 0, 0, 0, 2, 0, 0, 0, 1]


def test_the_count_of_unreadable_samples_survives_a_restart(leaf_shards, order):
    def watching() -> DataMonitor:
        return DataMonitor(DataConfig(max_bad_samples=2), ShardReader(leaf_shards / "train"), order)

    def with_bad(*slots: int) -> dict[str, torch.Tensor]:
        found = counts([0.5] * GLOBAL_BATCH)
        found["bad_slots"][list(slots)] = 1
        return found

    first, second = watching(), watching()
    first.add(1, with_bad(0, 3))
    first.check(None)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.add(1, with_bad(3))
    second.check(None)
    second.add(2, with_bad(5))
    with pytest.raises(ValueError, match=r"3 samples could not be read, more than data.max_bad_samples 2 allows"):
        second.check(None)
