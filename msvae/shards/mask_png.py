"""Leaf masks as 1-bit PNG: any PNG can be read, and those that are written here faster.

Pillow would take longer to decode a mask than the system to read the tile beside it.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
ONE_BIT_GREY = bytes((1, 0, 0, 0, 0))
"""Bit depth, colour type, compression, filter method, no interlacing."""
HEADER_BYTES = 33


def encode(leaf_mask: NDArray[np.bool_]) -> bytes:
    """A mask (H, W) as a PNG whose rows are not filtered."""
    height, width = leaf_mask.shape
    rows = np.zeros((height, 1 + (width + 7) // 8), np.uint8)
    rows[:, 1:] = np.packbits(leaf_mask, axis=1)
    header = struct.pack(">II", width, height) + ONE_BIT_GREY
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b""))
    return SIGNATURE + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def decode_into(png: bytes, leaf_mask: NDArray[np.bool_]) -> None:
    """The mask (H, W) of a PNG.

    Raises: ValueError when it is no PNG, or of another size.
    """
    if not _decode_plain(png, leaf_mask):
        _decode_any(png, leaf_mask)


def _decode_plain(png: bytes, leaf_mask: NDArray[np.bool_]) -> bool:
    """Decode a PNG as `encode` writes it; False for any other."""
    height, width = leaf_mask.shape
    header = SIGNATURE + struct.pack(">I4sII", 13, b"IHDR", width, height) + ONE_BIT_GREY
    num_bytes, kind = struct.unpack_from(">I4s", png, HEADER_BYTES) if len(png) > HEADER_BYTES + 8 else (0, b"")
    end = HEADER_BYTES + 8 + num_bytes
    if not png.startswith(header) or kind != b"IDAT" or png[end + 8 : end + 12] != b"IEND":
        return False
    row_bytes = 1 + (width + 7) // 8
    try:
        content = zlib.decompressobj().decompress(png[HEADER_BYTES + 8 : end], height * row_bytes)
    except zlib.error:
        return False
    if len(content) != height * row_bytes or content[::row_bytes].count(0) != height:
        return False
    rows = np.frombuffer(content, np.uint8)
    # as bytes: casting them to bool would take longer than unpacking
    leaf_mask.view(np.uint8)[:] = np.unpackbits(rows.reshape(height, row_bytes)[:, 1:], axis=1, count=width)
    return True


def _decode_any(png: bytes, leaf_mask: NDArray[np.bool_]) -> None:
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            if image.size != leaf_mask.shape[::-1]:
                raise ValueError(f"has a mask of {image.size} px, expected {leaf_mask.shape[::-1]}")
            if len(image.getbands()) > 1:
                raise ValueError(f"has a mask of mode {image.mode}, expected one grey value a pixel")
            leaf_mask[:] = np.asarray(image) > 0
    except (UnidentifiedImageError, OSError, SyntaxError, zlib.error, Image.DecompressionBombError) as error:
        raise ValueError(f"has a mask that is no PNG ({error})") from error
