"""Train a multispectral VAE: accelerate launch train/train.py --config FILE [--section.key value …]."""

import argparse
from pathlib import Path

from msvae.config import load_config
from msvae.distributed.exit_codes import STOPPED, run_script
from msvae.distributed.setup import check_writable, join_ranks
from msvae.training.trainer import Trainer


def main() -> int:
    """Read the configuration, join the other ranks and train. Returns the exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    arguments, overrides = parser.parse_known_args()
    config = load_config(arguments.config, overrides)
    check_writable(config.folder)
    return 0 if Trainer(config, join_ranks(config.train.timeout_s)).fit() else STOPPED


if __name__ == "__main__":
    run_script(
        main,
        "stopped; run the same command again to resume from the newest checkpoint",
        "lower data.micro_batch_size (results stay equal within rounding), or set train.gradient_checkpointing",
    )
