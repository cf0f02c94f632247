"""Evaluate a model: accelerate launch train/evaluate.py --model DIR --data DIR --out DIR."""

import argparse
from pathlib import Path

from msvae.distributed.exit_codes import run_script
from msvae.distributed.setup import check_writable, join_ranks
from msvae.evaluation.evaluate import evaluate


def main() -> None:
    """Read the arguments, join the other ranks and evaluate."""
    parser = argparse.ArgumentParser(description="Evaluate a model on a split and write metrics.json and report.html.")
    parser.add_argument("--model", type=Path, required=True, help="folder of a saved model, such as RUN/best")
    parser.add_argument("--data", required=True, help="folder or URL of a split, or of a dataset with test/ or val/")
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    arguments = parser.parse_args()
    check_writable(arguments.out)
    evaluate(arguments.model, arguments.data, arguments.out, join_ranks())


if __name__ == "__main__":
    run_script(main)
