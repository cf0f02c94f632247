"""Tasks of packing in this process, or in several that share nothing but the work folder."""

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
from multiprocessing import forkserver
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from msvae.rasters.gdal import gdal_session
from msvae.rasters.images import DataSet
from msvae.work_folder import WorkFolder

TaskT = TypeVar("TaskT")
Task = Callable[[DataSet, WorkFolder, TaskT, Callable[[int], None]], None]
"""Does one task and counts the tiles it has dealt with."""
POLL_S = 0.2
KEPT_BYTES = 2**24
"""More than the arrays of a tile take, and little beside the memory of a process."""

_here: tuple[DataSet, WorkFolder, Callable[[int], None]]
"""Of a worker process, from its start."""


class Workers:
    """Does tasks one after the other in this process, or several at once in processes of their own.

    Args: on_count: gets the number of tiles that were dealt with since the last call.
    """

    def __init__(
        self, data_set: DataSet, work: WorkFolder, on_count: Callable[[int], None], pool: ProcessPoolExecutor | None,
        counter: Any,
    ) -> None:  # fmt: skip
        self._data_set, self._work, self._on_count = data_set, work, on_count
        self._pool, self._counter, self._counted = pool, counter, 0

    def run(self, task: Task[TaskT], arguments: Sequence[TaskT]) -> None:
        """Do a task once for every argument.

        Raises: what a task raises; ValueError when a process was killed.
        """
        if self._pool is None:
            for argument in arguments:
                task(self._data_set, self._work, argument, self._on_count)
            return
        pending: set[Future[None]] = set()
        try:
            with _without_main():
                for argument in arguments:
                    pending.add(self._pool.submit(_do, task, argument))
            while pending:
                done, pending = wait(pending, POLL_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                self._tell()
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker process was ended from outside, often for want of memory; run the same command again to go "
                "on, with fewer --workers"
            ) from error
        finally:
            for future in pending:
                future.cancel()

    def _tell(self) -> None:
        counted = self._counter.value
        if counted > self._counted:
            self._on_count(counted - self._counted)
            self._counted = counted


@contextmanager
def workers(
    data_set: DataSet, work: WorkFolder, num_workers: int, on_count: Callable[[int], None]
) -> Iterator[Workers]:
    """`num_workers` processes that end with the block, or with this process."""
    if num_workers == 1:
        _keep_freed_memory()
        yield Workers(data_set, work, on_count, None, None)
        return
    # Workers must inherit neither open files of GDAL nor threads: a server that has imported all forks them.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "msvae.packing.shards", "msvae.packing.survey"])
    counter = context.Value("q", 0)
    with _one_thread_a_process():
        forkserver.ensure_running()
    with ProcessPoolExecutor(num_workers, context, _start, (data_set, work, counter)) as pool:
        yield Workers(data_set, work, on_count, pool, counter)


_main_is_hidden = threading.Lock()


@contextmanager
def _without_main() -> Iterator[None]:
    """A process that is started here imports nothing of the script that packs: that may take longer than packing."""
    with _main_is_hidden:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


@contextmanager
def _one_thread_a_process() -> Iterator[None]:
    """Matrix products of some bands only lose by more threads than processes."""
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
    """A fifth of the time of packing would be the system's, clearing pages for tiles that were just given back to it.

    Once an array of some size was freed, glibc keeps what is smaller (`M_MMAP_THRESHOLD` in mallopt(3)).
    """
    np.empty(KEPT_BYTES, np.uint8)


def _start(data_set: DataSet, work: WorkFolder, counter: Any) -> None:
    global _here
    _keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def count(num_tiles: int) -> None:
        with counter.get_lock():
            counter.value += num_tiles

    _here = data_set, work, count


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _do(task: Task[TaskT], argument: TaskT) -> None:
    data_set, work, count = _here
    with gdal_session():
        task(data_set, work, argument, count)
