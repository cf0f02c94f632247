"""What all tiles of a split have in common, and whether a tile and its mask are so."""

from __future__ import annotations

import io
import threading
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msvae.shards.manifest import Manifest
from msvae.shards.sample_codec import ENDINGS, Compression, decode_any_mask, decompress_into, npy_header

DTYPES = ("uint8", "uint16", "int16", "float32")
SIDE_STEP_PX = 8
"""The backbone halves a tile three times."""
PARSING = threading.Lock()
"""NumPy parses headers as Python, which in some versions of 3.11 fails when two threads do so at once (gh-106905)."""


class TileFormat:
    """Type and shape (C, H, W) of the tiles, as the header of a `.npy` states them."""

    def __init__(self, dtype: np.dtype[Any], shape: tuple[int, int, int], compression: Compression = "none") -> None:
        self.dtype, self.shape, self._compression = dtype, shape, compression
        self._header = npy_header(shape, dtype)
        self._num_bytes = len(self._header) + int(np.prod(shape)) * dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} tiles of shape {self.shape}"

    @classmethod
    def of_manifest(cls, manifest: Manifest) -> TileFormat:
        """That of a split."""
        shape = (len(manifest.bands), manifest.tile_px, manifest.tile_px)
        return cls(np.dtype(manifest.dtype), shape, manifest.compression)

    @property
    def ending(self) -> str:
        """Of the member that holds a tile, empty where any `.npy` may."""
        return "" if self._compression == "none" else ENDINGS[self._compression]

    @classmethod
    def of_npy(cls, npy: bytes) -> TileFormat:
        """That of a tile.

        Raises: ValueError when it is none that a split can have.
        """
        dtype, shape = _npy_header(npy)
        num_bands, *sides = shape if len(shape) == 3 else (0, 0, 0)
        if num_bands < 1 or sides[0] != sides[1] or sides[0] < SIDE_STEP_PX or sides[0] % SIDE_STEP_PX:
            raise ValueError(
                f"holds an array of shape {shape}, expected (bands, side, side) with a side in multiples of "
                f"{SIDE_STEP_PX}; write tiles channels first"
            )
        return cls(dtype, (num_bands, sides[0], sides[1]))

    def tile(self, npy: bytes) -> NDArray[Any]:
        """The tile (C, H, W), stored type, in the memory of `npy` where that is not compressed.

        Raises: ValueError when the array is of another type or shape, or has a header that the reader does not know.
        """
        if self._compression != "none":
            return self._decompressed(npy)
        if not npy.startswith(self._header) or len(npy) != self._num_bytes:
            dtype, shape = _npy_header(npy)
            if (dtype, shape) != (self.dtype, self.shape):
                raise ValueError(f"holds a {dtype} array of shape {shape}, expected {self}; write it again")
            raise ValueError(
                f"has a .npy of {len(npy)} bytes, expected {self._num_bytes} with a header as numpy.save writes it "
                "since 1.23; write it again"
            )
        return np.frombuffer(npy, self.dtype, offset=len(self._header)).reshape(self.shape)

    def _decompressed(self, chunk: bytes) -> NDArray[Any]:
        tile = np.empty(self.shape, self.dtype)
        try:
            decompress_into(bytearray(chunk), tile)
        except ValueError as error:
            raise ValueError(f"{error}, expected one of {self}; write it again") from None
        return tile

    def mask(self, png: bytes) -> NDArray[np.bool_]:
        """The leaf mask (H, W).

        Raises: ValueError when it is no PNG of one value a pixel, or of another size.
        """
        try:
            return decode_any_mask(png, self.shape[1:])
        except ValueError as error:
            raise ValueError(f"{error}; write it again as a grey PNG") from None


def _npy_header(npy: bytes) -> tuple[np.dtype[Any], tuple[int, ...]]:
    stream = io.BytesIO(npy)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        with PARSING:
            shape, fortran_order, dtype = read(stream)
    except (ValueError, TypeError, SyntaxError, TokenError, RecursionError) as error:
        raise ValueError(f"holds no .npy array ({str(error).splitlines()[0][:80]})") from None
    if dtype.hasobject:
        raise ValueError("holds Python objects, which could run code; write numbers")
    if fortran_order:
        raise ValueError("holds a Fortran-ordered array, expected C order; write numpy.ascontiguousarray(tile)")
    if dtype.byteorder == ">":
        raise ValueError(f"holds big-endian {dtype.name}, expected little endian; write tile.astype('{dtype.name}')")
    if dtype.name not in DTYPES:
        raise ValueError(f"holds {dtype.name}, expected {', '.join(DTYPES)}; write tile.astype(…)")
    return dtype, shape
