"""Promise 2: one global batch gives the same loss, gradients and coverage however it is split."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ..conftest import tiny_run

SCRIPT = Path(__file__).with_name("record_gradients.py")
GLOBAL_BATCH = 8


@pytest.fixture(scope="module")
def uneven_shards(leaf_images, tmp_path_factory) -> Path:
    """Tiles with hardly any leaf beside full ones: a mean of means would be far off."""
    from msvae.pack.job import pack
    from msvae.pack.options import PackOptions

    out = tmp_path_factory.mktemp("uneven") / "shards"
    pack([leaf_images], out, PackOptions(tile_px=32, min_coverage=0.0, tiles_per_shard=9))
    return out


def gradients(launch, shards: Path, out: Path, processes: int, micro: int, engine: str = "cpu") -> tuple[dict, dict]:
    out.mkdir()
    arguments = tiny_run(
        shards,
        out / "run",
        data__global_batch_size=GLOBAL_BATCH,
        data__micro_batch_size=micro,
        loss__kl_weight=0.01,
        data__flips=True,
        data__quarter_turns=True,
        data__crop_px=24,
        **{f"loss__{term}_weight": 0.3 for term in ("l1", "huber", "cosine", "signature", "range", "index")},
        train__seed=4,
    )
    done = launch(SCRIPT, out, *arguments, processes=processes, engine=engine)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "gradients.safetensors"), json.loads((out / "numbers.json").read_text())


@pytest.fixture(scope="module")
def alone(launch, uneven_shards, tmp_path_factory) -> tuple[dict, dict]:
    """One process that takes the global batch at once."""
    found = gradients(launch, uneven_shards, tmp_path_factory.mktemp("alone") / "1x8", processes=1, micro=8)
    assert len(found[0]) > 50
    return found


@pytest.mark.parametrize(
    ("engine", "processes", "micro"),
    [
        ("cpu", 1, 2),
        ("cpu", 2, 4),
        ("cpu", 2, 1),
        ("cpu", 4, 2),
        ("zero1", 2, 2),
        ("zero2", 2, 1),
        ("zero2", 4, 2),
        ("zero3", 2, 2),
    ],
)
def test_gradient_loss_and_coverage_are_the_same_however_a_batch_is_split(
    launch, uneven_shards, alone, tmp_path, engine, processes, micro
):
    split, numbers = gradients(launch, uneven_shards, tmp_path / "split", processes, micro, engine)
    expected, expected_numbers = alone
    assert split.keys() == expected.keys()
    scale = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in expected.values()))
    for name, gradient in split.items():
        difference = np.linalg.norm((gradient.astype(np.float64) - expected[name]).ravel())
        assert difference <= 1e-6 * scale, (name, difference / scale)
    assert numbers.keys() == expected_numbers.keys()
    for name, number in numbers.items():
        # what lies outside 0..1 is a small difference of large numbers
        rtol = 5e-5 if name == "total/range" else 1e-6
        np.testing.assert_allclose(number, expected_numbers[name], rtol=rtol, err_msg=name)
    for exact in ("mse", "sam", "valid_pixels", "total_pixels", "tile_coverage"):
        assert numbers[exact] == expected_numbers[exact]
