"""Headers of tiles are read the same from any number of threads."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from msvae.shards.audit.tar_samples import TileFormat

from .conftest import npy

TILE = npy(np.zeros((5, 16, 16), np.uint16))


def test_headers_are_parsed_one_at_a_time(monkeypatch):
    parse, parsing, at_once = np.lib.format.read_array_header_1_0, [], []

    def slow(stream):
        parsing.append(stream)
        time.sleep(0.01)
        at_once.append(len(parsing))
        try:
            return parse(stream)
        finally:
            parsing.pop()

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", slow)
    with ThreadPoolExecutor(4) as threads:
        formats = list(threads.map(TileFormat.of_npy, [TILE] * 8))
    assert at_once == [1] * 8
    assert {(str(each.dtype), each.shape) for each in formats} == {("uint16", (5, 16, 16))}


def test_an_expected_header_is_not_parsed(monkeypatch):
    expected = TileFormat.of_npy(TILE)
    monkeypatch.delattr(np.lib.format, "read_array_header_1_0")
    assert expected.tile(TILE).shape == (5, 16, 16)
