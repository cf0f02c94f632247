"""Run accelerate for node.sh: forward only SIGUSR2 to the ranks, and leave no process behind.

A scheduler may signal every process of a machine. torchrun would then end the ranks before they have saved.
"""

import contextlib
import signal
import sys

import psutil


def main() -> None:
    """Run `accelerate` with the arguments of this script."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
        # a handler that does nothing, because ranks would inherit SIG_IGN
        signal.signal(number, lambda *_: None)
    # imported after the handlers are set, so that a signal during the slow imports is handled
    from accelerate.commands.accelerate_cli import main as accelerate
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        accelerate()
    except SignalException:
        sys.exit(1)  # ranks and node.sh have printed the reason
    except ChildFailedError as summary:
        sys.exit(str(summary))
    finally:
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


if __name__ == "__main__":
    main()
