"""Headers of tiles are read the same from any number of threads."""

from __future__ import annotations

import gc
import sys
import threading

import numpy as np
import pytest

from msvae.shards.audit.tile_format import TileFormat

from .conftest import npy


class Finalised:
    """Lets other threads run wherever the garbage collector does."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        for _ in range(50):
            pass


@pytest.fixture
def restless_threads():
    interval_s, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(5)
    yield
    sys.setswitchinterval(interval_s)
    gc.set_threshold(*thresholds)


def test_headers_are_parsed_in_several_threads_at_once(restless_threads):
    tile, errors = npy(np.zeros((5, 16, 16), np.uint16)), []

    def parse(depth: int) -> None:
        if depth:
            return parse(depth - 1)
        for _ in range(1000):
            Finalised()
            try:
                TileFormat.of_npy(tile)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=parse, args=(7 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
