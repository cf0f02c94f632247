"""A global batch has the same loss, gradients and coverage, regardless of how it is split."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from ..conftest import tiny_run

SCRIPT = Path(__file__).with_name("record_gradients.py")
GLOBAL_BATCH, SMALL_BATCH = 16, 8
TOLERANCE = {"float32": 1e-6, "float64": 1e-12, "wide": 3e-7}
"""Tolerance of a gradient, relative to the norm of the whole gradient. ZeRO always adds gradients in float32."""


@dataclass(frozen=True)
class Case:
    """One of several ways to run the same step."""

    name: str
    precision: str
    changed: tuple[str, ...]
    half_empty: bool = False


@pytest.fixture(scope="module")
def uneven_shards(leaf_images, tmp_path_factory) -> Path:
    """Return shards with nearly empty and with full tiles, for which a mean of means would be far off."""
    from msvae.packing.options import PackOptions
    from msvae.packing.pack import pack

    out = tmp_path_factory.mktemp("uneven") / "shards"
    pack([leaf_images], out, PackOptions(tile_px=32, min_coverage=0.0, tiles_per_shard=9))
    return out


def record(launch, shards: Path, out: Path, processes: int, cases: list[Case], engine: str = "cpu") -> None:
    out.mkdir()
    arguments = tiny_run(
        shards,
        out / "run",
        data__val="null",
        data__global_batch_size=GLOBAL_BATCH,
        loss__kl_weight=0.01,
        data__flips=True,
        data__quarter_turns=True,
        data__crop_px=24,
        **{f"loss__{term}_weight": 0.3 for term in ("l1", "huber", "cosine", "signature", "range", "index")},
        train__seed=4,
    )
    settings = json.dumps([asdict(case) for case in cases])
    done = launch(SCRIPT, out, settings, *arguments, processes=processes, engine=engine)
    assert done.returncode == 0, done.stderr[-6000:]


def micro(size: int) -> tuple[str, ...]:
    return ("--data.micro_batch_size", str(size))


def small(size: int) -> tuple[str, ...]:
    """Return options for micro batches of a global batch that is small enough for float32 to be exact to 1e-6."""
    return (*micro(size), "--data.global_batch_size", str(SMALL_BATCH))


@pytest.fixture(scope="module")
def alone(launch, uneven_shards, tmp_path_factory) -> Path:
    """Record the step on one process: with the whole global batch, with micro batches, and in other ways."""
    out = tmp_path_factory.mktemp("alone") / "1x16"
    whole = [Case(precision, precision, micro(GLOBAL_BATCH)) for precision in ("float64", "wide")]
    whole += [Case("float32", "float32", small(SMALL_BATCH))]
    empty = [Case(f"{p}-half-empty", p, micro(GLOBAL_BATCH), half_empty=True) for p in ("float64", "wide")]
    parts = [Case(f"float64-{size}", "float64", micro(size)) for size in (8, 4)]
    record(launch, uneven_shards, out, 1, [*whole, *empty, *parts, *other_ways(SMALL_BATCH)])
    return out


def other_ways(size: int) -> list[Case]:
    return [
        Case(way, "float32", (*small(size), f"--train.{way}", "true"))
        for way in ("channels_last", "gradient_checkpointing")
    ]


def check_same(split: Path, alone: Path, case: str, reference: str) -> None:
    gradients, expected = (
        load_file(path / f"{name}.safetensors") for path, name in ((split, case), (alone, reference))
    )
    assert len(expected) > 50
    assert gradients.keys() == expected.keys()
    tolerance = TOLERANCE[reference.split("-")[0]]
    scale = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in expected.values()))
    for name, gradient in gradients.items():
        difference = np.linalg.norm((gradient.astype(np.float64) - expected[name]).ravel())
        assert difference <= tolerance * scale, (case, name, difference / scale)
    numbers, wanted = (
        json.loads((path / f"{name}.json").read_text()) for path, name in ((split, case), (alone, reference))
    )
    assert numbers.keys() == wanted.keys()
    for name, number in numbers.items():
        rtol = 1e-6 if reference == "float32" else 1e-11
        if name == "total/range":
            # the excess over 0..1 is a small difference of large numbers
            rtol *= 50
        elif name == "grad_norm":
            rtol = tolerance
        np.testing.assert_allclose(number, wanted[name], rtol=rtol, err_msg=f"{case}: {name}")
    for exact in ("mse", "sam", "valid_pixels", "total_pixels", "tile_coverage"):
        assert numbers[exact] == wanted[exact]


def check_empty(out: Path, case: str, processes: int) -> None:
    """Check that a global batch without leaf changed no weight, moment or average on any rank, and was counted."""
    for rank in range(processes):
        assert json.loads((out / f"{case}-rank-{rank}.json").read_text())["changed_by_empty"] == []


def test_a_step_on_one_process_is_the_same_with_micro_batches_channels_last_and_checkpointing(alone):
    for case in ("float64-8", "float64-4"):
        check_same(alone, alone, case, "float64")
    for case in ("channels_last", "gradient_checkpointing"):
        check_same(alone, alone, case, "float32")
    check_empty(alone, "float64", 1)


@pytest.mark.parametrize(
    ("engine", "processes"),
    [
        ("cpu", 2),
        ("zero2", 2),
        *(
            pytest.param(engine, processes, marks=pytest.mark.slow)
            for engine, processes in (("cpu", 4), ("zero1", 2), ("zero3", 2), ("zero2", 4), ("zero3", 4))
        ),
    ],
)
def test_a_step_is_the_same_however_its_global_batch_is_split(
    launch, uneven_shards, alone, tmp_path, engine, processes
):
    """The step has 1, 2 or 4 micro batches per rank, leaf on one rank only, or no leaf at all."""
    out, exact = tmp_path / "split", "float64" if engine == "cpu" else "wide"
    share = GLOBAL_BATCH // processes
    sizes = [share, share // 2, share // 4]
    cases = [Case(f"{exact}-{size}", exact, micro(size)) for size in sizes]
    cases += [Case("float32", "float32", small(sizes[2])), Case("empty", exact, micro(sizes[1]), half_empty=True)]
    cases += other_ways(sizes[2]) if (engine, processes) == ("zero3", 2) else []
    record(launch, uneven_shards, out, processes, cases, engine)
    for case in cases:
        reference = f"{exact}-half-empty" if case.half_empty else case.precision
        check_same(out, alone, case.name, reference)
        check_empty(out, case.name, processes)
    leaf = [sum(json.loads((out / f"empty-rank-{rank}.json").read_text())["leaf_pixels"]) for rank in range(processes)]
    assert leaf[0] > 0
    assert not any(leaf[1:]), "all leaf is on the first rank"
