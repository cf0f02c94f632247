"""Judge a model: accelerate launch train/evaluate.py --model DIR --data DIR --out DIR."""

import argparse
from pathlib import Path

from msvae.distributed.exit_codes import run_script
from msvae.distributed.setup import check_writable, join_ranks
from msvae.evaluation.evaluate import evaluate


def main() -> None:
    """Read the arguments, join the other ranks, evaluate."""
    parser = argparse.ArgumentParser(description="Write metrics.json and report.html of a model on a split.")
    parser.add_argument("--model", type=Path, required=True, help="a saved model, such as RUN/best")
    parser.add_argument("--data", required=True, help="a split, or a data set with test/ or val/; folder or URL")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    check_writable(arguments.out)
    evaluate(arguments.model, arguments.data, arguments.out, join_ranks())


if __name__ == "__main__":
    run_script(main)
