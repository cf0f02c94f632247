"""What checkpoints cost: bytes on the disk, and the delay of the steps they fall between, with an SD3-size VAE.

python bench/checkpoints.py [--steps 12] [--rounds 2]

Runs that save every third step and runs that save only at their end take turns, with a frozen and a trained backbone.
`copy` is the time that training stands still for one checkpoint, in steps. `delay` is how much longer the steps take
beside the thread that writes, mean over all of them, in steps. `once` is what a run stores once: the untrained model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from scaling import CPU_CONFIG, Figures, figures, launch, prepare

SAVE_EVERY = 3


def num_bytes(folder: Path) -> int:
    """Of all files below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    """Rounds that take turns, then one line."""
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
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args(namespace=argparse.Namespace(config_file=CPU_CONFIG))
    if arguments.steps <= SAVE_EVERY:
        parser.error(
            f"got --steps {arguments.steps}, expected more than {SAVE_EVERY}: a checkpoint is made every {SAVE_EVERY}"
        )
    print(f"{'backbone':>8} {'each (MB)':>10} {'once (MB)':>10} {'copy':>8} {'delay':>8}")
    with tempfile.TemporaryDirectory() as temporary:
        prepare(Path(temporary))
        for arguments.full in (False, True):
            measure(Path(temporary), arguments)


if __name__ == "__main__":
    main()
