"""Compare runs: python train/compare.py RUN_A RUN_B … --out DIR."""

import argparse
from pathlib import Path

from msvae.evaluation.compare import compare


def main() -> None:
    """Read the arguments and compare the runs. An error is printed as one line, with exit code 2."""
    parser = argparse.ArgumentParser(description="Print the metrics of runs side by side and write compare.html.")
    parser.add_argument("runs", nargs="+", help="folders that train/train.py wrote, two or more")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    try:
        compare(arguments.runs, arguments.out)
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
