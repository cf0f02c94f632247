"""Train a multispectral VAE: accelerate launch train/train.py --config FILE [--section.key value …]."""

import argparse
import sys
from pathlib import Path

from msvae.config import load_config
from msvae.engine.setup import check_writable, join, run_script
from msvae.engine.stop import EXIT_CODE
from msvae.engine.trainer import Trainer


def main() -> None:
    """Read the configuration, join the other ranks, train."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path)
    arguments, overrides = parser.parse_known_args()
    config = load_config(arguments.config, overrides)
    check_writable(config.folder)
    if not Trainer(config, join(config.train.timeout_s)).fit():
        sys.exit(EXIT_CODE)


if __name__ == "__main__":
    run_script(main)
