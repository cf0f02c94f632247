"""A tile as the bytes of its member: a plain `.npy` file, or compressed. Decoding runs no code from the data."""

from __future__ import annotations

import io
from functools import cache
from typing import Any, Literal

import imagecodecs
import numpy as np
from numpy.typing import NDArray

Compression = Literal["none", "delta-blosc2"]
ENDINGS: dict[Compression, str] = {"none": "bands.npy", "delta-blosc2": "bands.blosc2"}

ZSTD, SHUFFLE = 4, imagecodecs.BLOSC2.FILTER.SHUFFLE
CHUNK_HEADER_BYTES = 32
BIAS = 128
"""Added to differences: small ones of either sign then have a high byte of 0, which decodes in no time."""


def encode(tile: NDArray[Any], compression: Compression) -> bytes:
    """The member of a tile (C, H, W): little endian, C-ordered.

    `delta-blosc2` is one Blosc2 chunk (zstd, shuffle) of 128 plus the difference between each value and the one to its
    left (0 at the left edge), as unsigned integers of the same width that wrap around.
    """
    little_endian = np.ascontiguousarray(tile, dtype=tile.dtype.newbyteorder("<"))
    if compression == "none":
        return npy_header(tile.shape, little_endian.dtype) + little_endian.data
    differences = imagecodecs.delta_encode(_as_integers(little_endian), axis=-1)
    compressed = imagecodecs.blosc2_encode(
        np.add(differences, BIAS, dtype=differences.dtype).tobytes(),
        level=1,
        compressor="zstd",
        shuffle=SHUFFLE,
        typesize=tile.dtype.itemsize,
        numthreads=1,
    )
    return bytes(compressed)


@cache
def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """What stands before the values in a `.npy` file of format 1.0."""
    buffer = io.BytesIO()
    description = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def decompress_into(chunk: bytearray, tile: NDArray[Any]) -> None:
    """The compressed member of a tile, into the tile.

    Raises: ValueError when it is no chunk of this size made with the codec and filter that `encode` uses: other ones
        may be plugins, which are code.
    """
    num_bytes, chunk_bytes = (int.from_bytes(chunk[start : start + 4], "little") for start in (4, 12))
    known = len(chunk) >= CHUNK_HEADER_BYTES and chunk[2] >> 5 == ZSTD and set(chunk[16:22]) <= {0, SHUFFLE}
    if not known or num_bytes != tile.nbytes or chunk_bytes != len(chunk):
        raise ValueError(f"no Blosc2 chunk of {tile.nbytes} bytes made by zstd and shuffle")
    try:
        imagecodecs.blosc2_decode(chunk, numthreads=1, out=tile.data.cast("B"))
    except imagecodecs.Blosc2Error as error:
        raise ValueError(f"damaged Blosc2 chunk: {error}") from error
    integers = _as_integers(tile)
    np.subtract(integers, BIAS, out=integers)
    imagecodecs.delta_decode(integers, axis=-1, out=integers)


def _as_integers(tile: NDArray[Any]) -> NDArray[Any]:
    return tile.view(f"<u{tile.dtype.itemsize}")
