"""Run tasks of packing in this process, or in several processes that share only the work folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import forkserver
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from msvae.packing.options import PackOptions
from msvae.rasters.gdal import gdal_session
from msvae.rasters.images import ImageSet
from msvae.work_folder import WorkFolder

POLL_S = 0.2
KEPT_BYTES = 2**24
"""Size of an array that is larger than the arrays of a tile, and small compared with the memory of a process."""


@dataclass(frozen=True)
class PackJob:
    """Everything that a task needs, in whichever process it runs."""

    image_set: ImageSet
    options: PackOptions
    work: WorkFolder


ArgumentT = TypeVar("ArgumentT")
OnTiles = Callable[[int], None]
"""Called with the number of tiles that were masked, surveyed or written."""
Task = Callable[[PackJob, ArgumentT, OnTiles], None]

_job_of_this_worker: tuple[PackJob, OnTiles]
"""Set when a worker process starts."""


class Workers:
    """Runs tasks one after the other in this process, or in the processes of a pool.

    Args: on_tiles: called with the number of tiles since the last call.
    """

    def __init__(
        self, job: PackJob, on_tiles: OnTiles, pool: ProcessPoolExecutor | None = None, counter: Any = None
    ) -> None:
        self._job, self._on_tiles, self._pool = job, on_tiles, pool
        self._counter, self._num_reported = counter, 0

    def run(self, task: Task[ArgumentT], arguments: Sequence[ArgumentT]) -> None:
        """Run a task once for every argument.

        Raises: the errors of the task; ValueError if a process was killed.
        """
        if self._pool is None:
            for argument in arguments:
                task(self._job, argument, self._on_tiles)
            return
        pending: set[Future[None]] = set()
        try:
            with _without_main():
                for argument in arguments:  # one by one, so that an interrupt cancels those submitted so far
                    pending.add(self._pool.submit(_run_in_worker, task, argument))
            while pending:
                done, pending = wait(pending, POLL_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                self._report_progress()
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process was killed, often because memory ran out; run the same command again to resume, "
                "with fewer --workers"
            ) from error
        finally:
            for future in pending:
                future.cancel()

    def _report_progress(self) -> None:
        num_tiles = self._counter.value
        if num_tiles > self._num_reported:
            self._on_tiles(num_tiles - self._num_reported)
            self._num_reported = num_tiles


@contextmanager
def start_workers(job: PackJob, num_workers: int, on_tiles: OnTiles) -> Iterator[Workers]:
    """Start `num_workers` processes, which end with the block or with this process. For 1, use this process itself."""
    if num_workers == 1:
        _keep_freed_memory()
        yield Workers(job, on_tiles)
        return
    # Workers must not inherit open files of GDAL or threads. With `spawn` each would import everything anew, which
    # takes seconds; the server of `forkserver` imports once and forks them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["msvae.packing.shards", "msvae.packing.survey"])
    counter = context.Value("q", 0)
    with _one_thread_per_process():
        forkserver.ensure_running()
    with ProcessPoolExecutor(num_workers, context, _start_worker, (job, counter)) as pool:
        yield Workers(job, on_tiles, pool, counter)


_main_is_hidden = threading.Lock()


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep new processes from importing the script that packs, which may take longer than packing."""
    with _main_is_hidden:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


@contextmanager
def _one_thread_per_process() -> Iterator[None]:
    """Let new processes use one thread each: for products of small matrices, more threads than cores are slower."""
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OPENBLAS_NUM_THREADS"]
        else:
            os.environ["OPENBLAS_NUM_THREADS"] = before


def _keep_freed_memory() -> None:
    """Make the C library keep freed memory for the next tile.

    Otherwise the system spends a fifth of the time of packing on clearing pages that were just returned to it. After
    an array was freed, glibc keeps the memory of smaller arrays (`M_MMAP_THRESHOLD` in mallopt(3)).
    """
    np.empty(KEPT_BYTES, np.uint8)


def _start_worker(job: PackJob, counter: Any) -> None:
    global _job_of_this_worker
    _keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def count(num_tiles: int) -> None:
        with counter.get_lock():
            counter.value += num_tiles

    _job_of_this_worker = job, count


def _end_with_parent() -> None:
    """End this process when its parent is killed; the pool alone would wait forever for more work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _run_in_worker(task: Task[ArgumentT], argument: ArgumentT) -> None:
    job, on_tiles = _job_of_this_worker
    with gdal_session():
        task(job, argument, on_tiles)
