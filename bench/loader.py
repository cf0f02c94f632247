"""Compare msvae's loader to other loaders: each stores the same tiles and masks in its own format and reads them.

python bench/loader.py [--tiles 2000] [--rounds 3] [--readers 1 2] [--compressed] [--json FILE]

Every measurement runs in a new process. Loaders take turns in every round. Prints medians as ratios to webdataset.
A peer that cannot be imported is skipped; `pip install -e .[peers] -c constraints.txt` installs them.
mosaicml-streaming needs an environment of its own.

Columns: `integers` are batches of the stored uint16; `floats` are batches of reflectance, converted by the main
process if the loader does not convert. Memory is anonymous + shared memory of all processes. Rates and CPU time, also
of all processes, are those of the second epoch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

PEERS = {
    "webdataset": "wds",
    "msvae": "msvae",
    "litdata": "lit",
    "mosaicml-streaming": "mosaic",
    "megatron-energon": "energon",
    "folder of TIFFs": "tiffs",
}
COMPRESSED = {"msvae blosc2": "msvae_blosc2"}
TIMEOUT_S = 600
MIN_TILES = 128
"""Half an epoch then has two batches of 32: state can be saved after the second batch at the earliest."""
Figures = dict[str, float]


@dataclass
class Results:
    """Figures of every round by number of readers and peer, and the reason why a peer is missing."""

    rounds: dict[tuple[int, str], list[Figures]] = field(default_factory=dict)
    limits: list[Figures] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def medians(self, num_readers: int, peer: str) -> Figures:
        """Return the median of each figure over the rounds."""
        return medians(self.rounds[num_readers, peer])


def medians(rounds: list[Figures]) -> Figures:
    """Return the median of each figure."""
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


def in_new_process(act: str, module: str, folder: Path, num_tiles: int, num_readers: int) -> Figures:
    """Return the figures that `peers.measure` prints. Raises: RuntimeError with the last line of its error."""
    here = str(Path(__file__).parent)
    paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
    child = subprocess.run(
        [sys.executable, "-m", "peers.measure", act, module, str(folder), str(num_tiles), str(num_readers)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    if child.returncode:
        raise RuntimeError((child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1])
    figures: Figures = json.loads(child.stdout.splitlines()[-1])
    return figures


def measure(data: Path, wanted: dict[str, str], num_tiles: int, num_rounds: int, reader_counts: list[int]) -> Results:
    """Write the data of every peer that can be imported, then measure in turns."""
    results, peers = Results(), dict(wanted)
    for peer, module in wanted.items():
        try:
            in_new_process("write", module, data / module, num_tiles, 0)
        except RuntimeError as reason:
            results.skipped[peer] = str(reason)
            print(f"skipped {peer}: {reason}", flush=True)
            del peers[peer]
    os.sync()
    for number in range(1, num_rounds + 1):
        results.limits.append(in_new_process("limits", "limits", data / PEERS["msvae"], num_tiles, 1))
        for num_readers in reader_counts:
            for peer, module in peers.items():
                figures: Figures = {}
                for act in ("epochs", "resume"):
                    figures |= in_new_process(act, module, data / module, num_tiles, num_readers)
                results.rounds.setdefault((num_readers, peer), []).append(figures)
        print(f"round {number} of {num_rounds} done", flush=True)
    return results


def show(results: Results, reader_counts: list[int]) -> None:
    """Print one table for each number of readers."""
    for num_readers in reader_counts:
        base = results.medians(num_readers, "webdataset")
        print(f"\n{num_readers} reader(s): ratio to webdataset (figure)")
        print(
            f"{'':>18} {'integers/s':>14} {'CPU us/tile':>14} {'floats/s':>14} {'CPU us/tile':>14} {'memory MB':>14} "
            f"{'first batch s':>14} {'resumed s':>14}  right  shards of 16"
        )
        for readers, peer in results.rounds:
            if readers != num_readers:
                continue
            own = results.medians(readers, peer)
            cells = [
                f"{f'{own[name] / base[name]:.2f}x ({own[name]:.{digits}f})':>14}"
                for name, digits in (
                    ("integers_per_s", 0),
                    ("integers_cpu_us", 0),
                    ("floats_per_s", 0),
                    ("floats_cpu_us", 0),
                    ("memory_mb", 0),
                    ("first_batch_s", 2),
                    ("resumed_s", 2),
                )
            ]
            right = "yes" if own["resumed_exactly"] else "no"
            print(f"{peer:>18} {' '.join(cells)} {right:>6} {own['distinct_shards']:>13.2f}")
        for limit, tiles_per_s in medians(results.limits).items():
            ratio = f"{tiles_per_s / base['integers_per_s']:.2f}x ({tiles_per_s:.0f})"
            reached = results.medians(num_readers, "msvae")["integers_per_s"] / tiles_per_s
            print(f"{limit:>18} {ratio:>14}  one thread; the integers of msvae reach {reached:.0%} of it")


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--readers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--compressed", action="store_true", help="also measure compressed shards of msvae")
    parser.add_argument("--json", type=Path, help="file for all figures of all rounds")
    arguments = parser.parse_args()
    if arguments.tiles < MIN_TILES:
        parser.error(f"got --tiles {arguments.tiles}, expected {MIN_TILES} or more; pass more tiles")
    with tempfile.TemporaryDirectory() as temporary:
        wanted = PEERS | (COMPRESSED if arguments.compressed else {})
        results = measure(Path(temporary), wanted, arguments.tiles, arguments.rounds, arguments.readers)
    show(results, arguments.readers)
    if arguments.json:
        rounds = [
            {"readers": readers, "peer": peer, "rounds": figures}
            for (readers, peer), figures in results.rounds.items()
        ]
        everything = {"peers": rounds, "limits": results.limits, "skipped": results.skipped}
        arguments.json.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
