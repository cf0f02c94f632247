"""accelerate's launcher for node.sh: heeds SIGUSR2 alone, which it hands on to the ranks, and leaves none behind.

A scheduler may signal every process of a machine; torchrun would then end the ranks before they have saved.
"""

import signal

import psutil


def main() -> None:
    """Run `accelerate` with the arguments of this script."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        # a handler, for what is ignored would be ignored by ranks, too
        signal.signal(number, lambda *_: None)
    from accelerate.commands.accelerate_cli import main as accelerate

    try:
        accelerate()
    finally:
        for process in psutil.Process().children(recursive=True):
            process.kill()


if __name__ == "__main__":
    main()
