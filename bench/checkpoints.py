"""Measure what checkpoints of an SD3-size VAE cost: bytes on disk, and the delay of training steps.

python bench/checkpoints.py [--steps 12] [--rounds 2]

Runs that save every third step and runs that save only at their end take turns, with a frozen and a trained backbone.

Columns: `each` is the size of one checkpoint; `once` is the size of the untrained model, which a run stores once;
`copy` is how long training pauses for one checkpoint, in steps; `delay` is how much longer a step takes on average
while a thread writes checkpoints, in steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from scaling import CPU_CONFIG, Figures, figures, launch, prepare

SAVE_EVERY = 3


def num_bytes(folder: Path) -> int:
    """Return the size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Run all rounds in turns and print one line of the table."""
    steps: dict[int, list[Figures]] = {SAVE_EVERY: [], arguments.steps: []}
    for _ in range(arguments.rounds):
        for every, found in steps.items():
            found += figures(folder, {"run": launch(folder, "run", 1, every, arguments)})
    saving, plain = (statistics.median(f["step"] for f in found) for found in steps.values())
    copy = statistics.median(f["snapshot"] for f in steps[SAVE_EVERY])
    newest = max((folder / "run" / "checkpoints").glob("step-*"))
    once = num_bytes(folder / "run" / "untrained")
    print(
        f"{'trained' if arguments.full else 'frozen':>8} {num_bytes(newest) / 1e6:10.2f} {once / 1e6:10.2f} "
        f"{copy / plain:8.4f} {(saving - copy / SAVE_EVERY) / plain - 1:8.4f}"
    )


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args(namespace=argparse.Namespace(config_file=CPU_CONFIG))
    if arguments.steps <= SAVE_EVERY:
        parser.error(
            f"got --steps {arguments.steps}, expected more than {SAVE_EVERY}, the interval of checkpoints; pass more"
        )
    print(f"{'backbone':>8} {'each (MB)':>10} {'once (MB)':>10} {'copy':>8} {'delay':>8}")
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        for arguments.full in (False, True):
            measure(Path(temporary), arguments)


if __name__ == "__main__":
    main()
