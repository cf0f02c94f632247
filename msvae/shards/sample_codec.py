"""Bytes of the members of a sample: tiles as `.npy` or compressed, and leaf masks as PNG.

Decoding never runs code from the data.
"""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from typing import Any, Literal

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

Compression = Literal["none", "delta-blosc2"]
ENDINGS: dict[Compression, str] = {"none": "bands.npy", "delta-blosc2": "bands.blosc2"}
"""Ending of the member with the tile, by compression."""

ZSTD, SHUFFLE = 4, imagecodecs.BLOSC2.FILTER.SHUFFLE
CHUNK_HEADER_BYTES = 32
BIAS = 128
"""Offset that is added to differences. Small differences of either sign then have a high byte of 0, which decodes
fastest."""

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_HEADER_BYTES = 33
ONE_BIT_GREY = bytes((1, 0, 0, 0, 0))
"""Bit depth, colour type, compression, filter method and interlacing of the masks that are written here."""
MASK_MODES = ("1", "L", "I", "I;16")
"""Modes of Pillow with one grey value per pixel. Palette images (mode P) hold indices, not grey values."""


def encode_tile(tile_CHW: NDArray[Any], compression: Compression) -> bytes:
    """Return the member of a tile (C, H, W): little endian, C-ordered.

    `delta-blosc2` is one Blosc2 chunk (zstd, shuffle). It holds 128 plus the difference between each value and its
    left neighbour (0 at the left edge), as unsigned integers of the same width that wrap around.
    """
    little_endian = np.ascontiguousarray(tile_CHW, dtype=tile_CHW.dtype.newbyteorder("<"))
    if compression == "none":
        return npy_header(tile_CHW.shape, little_endian.dtype) + little_endian.data
    differences = imagecodecs.delta_encode(_as_integers(little_endian), axis=-1)
    compressed = imagecodecs.blosc2_encode(
        np.add(differences, BIAS, dtype=differences.dtype).tobytes(),
        level=1,
        compressor="zstd",
        shuffle=SHUFFLE,
        typesize=tile_CHW.dtype.itemsize,
        numthreads=1,
    )
    return bytes(compressed)


@cache
def npy_header(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bytes:
    """Return the header of a `.npy` file of format 1.0."""
    buffer = io.BytesIO()
    description = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


def decompress_into(chunk: bytearray, tile_CHW: NDArray[Any]) -> None:
    """Decode the compressed member of a tile into `tile_CHW`.

    Raises: ValueError if it is not a chunk of this size, or uses another codec or filter than `encode_tile`. Other
        codecs and filters may be plugins, and a plugin is code.
    """
    num_bytes, chunk_bytes = (int.from_bytes(chunk[start : start + 4], "little") for start in (4, 12))
    known = len(chunk) >= CHUNK_HEADER_BYTES and chunk[2] >> 5 == ZSTD and set(chunk[16:22]) <= {0, SHUFFLE}
    if not known or num_bytes != tile_CHW.nbytes or chunk_bytes != len(chunk):
        raise ValueError(f"is not a Blosc2 chunk of {tile_CHW.nbytes} bytes made by zstd and shuffle")
    try:
        imagecodecs.blosc2_decode(chunk, numthreads=1, out=tile_CHW.data.cast("B"))
    except imagecodecs.Blosc2Error as error:
        raise ValueError(f"holds a damaged Blosc2 chunk ({error})") from error
    integers = _as_integers(tile_CHW)
    np.subtract(integers, BIAS, out=integers)
    imagecodecs.delta_decode(integers, axis=-1, out=integers)


def _as_integers(tile: NDArray[Any]) -> NDArray[Any]:
    return tile.view(f"<u{tile.dtype.itemsize}")


def encode_mask(leaf_HW: NDArray[np.bool_]) -> bytes:
    """Return a mask (H, W) as a 1-bit PNG with unfiltered rows."""
    height, width = leaf_HW.shape
    rows = np.zeros((height, 1 + (width + 7) // 8), np.uint8)
    rows[:, 1:] = np.packbits(leaf_HW, axis=1)
    header = struct.pack(">II", width, height) + ONE_BIT_GREY
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def decode_mask_into(png: bytes, leaf_HW: NDArray[np.bool_]) -> None:
    """Decode a mask into `leaf_HW`. A pixel is leaf if its grey value is not 0.

    PNGs that `encode_mask` wrote are decoded without Pillow, which would take longer than reading the tile.
    Raises: ValueError if it is not a PNG, has another size, or has not one grey value per pixel.
    """
    if not _decode_one_bit_mask(png, leaf_HW):
        leaf_HW[:] = decode_any_mask(png, leaf_HW.shape)


def _decode_one_bit_mask(png: bytes, leaf_HW: NDArray[np.bool_]) -> bool:
    """Decode a PNG of the form that `encode_mask` writes. Returns: False for any other form."""
    height, width = leaf_HW.shape
    header = PNG_SIGNATURE + struct.pack(">I4sII", 13, b"IHDR", width, height) + ONE_BIT_GREY
    data_start = PNG_HEADER_BYTES + 8
    num_bytes, kind = struct.unpack_from(">I4s", png, PNG_HEADER_BYTES) if len(png) > data_start else (0, b"")
    end = data_start + num_bytes
    if not png.startswith(header) or kind != b"IDAT" or png[end + 8 : end + 12] != b"IEND":
        return False
    row_bytes = 1 + (width + 7) // 8
    try:
        content = zlib.decompressobj().decompress(png[data_start:end], height * row_bytes)
    except zlib.error:
        return False
    if len(content) != height * row_bytes or content[::row_bytes].count(0) != height:
        return False
    rows = np.frombuffer(content, np.uint8)
    # write into a view of bytes, because casting to bool would take longer than unpacking
    leaf_HW.view(np.uint8)[:] = np.unpackbits(rows.reshape(height, row_bytes)[:, 1:], axis=1, count=width)
    return True


def decode_any_mask(png: bytes, shape_HW: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return the mask (H, W) in any PNG with one grey value per pixel. A pixel is leaf if its value is not 0.

    Raises: ValueError if it is not a PNG, has another size, or is a colour or palette image.
    """
    size = shape_HW[::-1]
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.size != size:
                raise ValueError(f"has a mask of {image.size} px, expected {size}")
            if image.mode not in MASK_MODES:
                raise ValueError(f"has a mask of mode {image.mode}, expected one grey value per pixel")
            leaf_HW: NDArray[np.bool_] = np.asarray(image) > 0
    except (OSError, SyntaxError, EOFError, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(f"has a mask that is not a PNG ({error})") from error
    return leaf_HW
