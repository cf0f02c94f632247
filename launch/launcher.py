"""accelerate's launcher for node.sh: heeds SIGUSR2 alone, which it hands on to the ranks, and leaves none behind.

A scheduler may signal every process of a machine; torchrun would then end the ranks before they have saved.
"""

import contextlib
import signal
import sys

import psutil


def main() -> None:
    """Run `accelerate` with the arguments of this script."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        # a handler, for what is ignored would be ignored by ranks, too
        signal.signal(number, lambda *_: None)
    # late, so that a signal that comes while libraries are read is heard
    from accelerate.commands.accelerate_cli import main as accelerate
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        accelerate()
    except SignalException:
        sys.exit(1)  # ranks and node.sh have said why
    except ChildFailedError as summary:
        sys.exit(str(summary))
    finally:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


if __name__ == "__main__":
    main()
