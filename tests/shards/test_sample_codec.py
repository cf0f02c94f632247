from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from msvae.shards.sample_codec import decode_mask_into, encode_mask

from .conftest import palette_png

masks = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=40))


def pillow_png(mask: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def decoded(png: bytes, shape: tuple[int, ...]) -> np.ndarray:
    mask = np.zeros(shape, np.bool_)
    decode_mask_into(png, mask)
    return mask


@given(masks)
def test_encoded_masks_decode_to_the_same_and_pillow_agrees(mask):
    png = encode_mask(mask)
    np.testing.assert_array_equal(decoded(png, mask.shape), mask)
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert image.mode == "1"
        np.testing.assert_array_equal(np.asarray(image), mask)


@given(masks, st.sampled_from(["1", "L", "I;16", "interlaced", "two parts"]))
def test_masks_from_other_writers_are_read(mask, kind):
    if kind == "1":
        png = pillow_png(mask)
    elif kind == "L":
        png = pillow_png(mask.astype(np.uint8) * 255)
    elif kind == "I;16":
        png = pillow_png(mask.astype(np.uint16) * 65535)
    elif kind == "interlaced":
        png = pillow_png(mask, optimize=True)
    else:
        png = in_two_parts(encode_mask(mask))
    np.testing.assert_array_equal(decoded(png, mask.shape), mask)


def in_two_parts(png: bytes) -> bytes:
    """Return the PNG with its IDAT chunk cut in two."""
    (length,) = struct.unpack_from(">I", png, 33)
    data, rest = png[41 : 41 + length], png[45 + length :]
    parts = (data[:3], data[3:])
    chunks = [struct.pack(">I", len(p)) + b"IDAT" + p + struct.pack(">I", zlib.crc32(b"IDAT" + p)) for p in parts]
    return png[:33] + b"".join(chunks) + rest


@pytest.mark.parametrize(
    ("png", "message"),
    [
        (encode_mask(np.ones((8, 9), bool)), r"a mask of \(9, 8\) px, expected \(8, 8\)"),
        (encode_mask(np.ones((8, 8), bool))[:44], "not a PNG"),
        (b"", "not a PNG"),
        (b"GIF89a" + bytes(50), "not a PNG"),
        (
            palette_png(np.eye(8, dtype=np.uint8), [255, 255, 255, 0, 0, 0]),
            "a mask of mode P, expected one grey value per pixel",
        ),
        (
            palette_png(np.eye(8, dtype=np.uint8), [0, 0, 0, 255, 255, 255]),
            "a mask of mode P, expected one grey value per pixel",
        ),
    ],
    ids=[
        "another size",
        "cut",
        "nothing",
        "another format",
        "palette of white and black",
        "palette of black and white",
    ],
)
def test_an_invalid_mask_is_an_error(png, message):
    with pytest.raises(ValueError, match=message):
        decoded(png, (8, 8))


def test_decompression_of_a_mask_stops_at_its_size():
    bomb = zlib.compress(bytes(10**8), 9)
    png = encode_mask(np.ones((8, 8), bool))
    chunk = struct.pack(">I", len(bomb)) + b"IDAT" + bomb + struct.pack(">I", zlib.crc32(b"IDAT" + bomb))
    (length,) = struct.unpack_from(">I", png, 33)
    bomb_png = png[:33] + chunk + png[45 + length :]
    np.testing.assert_array_equal(decoded(bomb_png, (8, 8)), np.zeros((8, 8), bool))
