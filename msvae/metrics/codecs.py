"""JPEG XL and JPEG 2000 at a given size: each band of a tile is a grey image of 16 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import imagecodecs
import numpy as np
from numpy.typing import NDArray

HEADER_BYTES = 8
"""Size of the header of a tile: the reflectances of the grey values 0 and 65535 as float32."""
SUFFICIENT_SHARE = 0.98
"""Share of the allowed bytes at which the search for a quality stops."""
MAX_TRIES = 10
FEWEST_BYTES = 60
"""Rough size of the code of one band at the coarsest quality."""
FULL_SCALE = 65535

Grey = NDArray[np.float64]
"""Grey image (H, W) with values from 0 to 65535."""


class Codec(NamedTuple):
    """An encoder of grey images and its decoder. Both get the quality, from 0 (coarsest) to 1."""

    encode: Callable[[Grey, float], bytes]
    decode: Callable[[bytes, float], Grey]


@dataclass(frozen=True)
class CodedTile:
    """A tile after coding and decoding."""

    reflectance: NDArray[np.float64]
    """Decoded tile, (C, H, W)."""
    num_bytes: int
    """Size of the code, header included."""


def jpeg_xl() -> Codec:
    """Return lossy JPEG XL at effort 5 of 9.

    The quality sets the logarithm of the Butteraugli distance, from 25 to 0.01.
    """

    def encode(grey: Grey, quality: float) -> bytes:
        distance = 25.0 * (0.01 / 25.0) ** quality
        return bytes(imagecodecs.jpegxl_encode(_integers(grey), distance=distance, effort=5, numthreads=1))

    def decode(code: bytes, _: float) -> Grey:
        return np.asarray(imagecodecs.jpegxl_decode(code, numthreads=1), np.float64)

    return Codec(encode, decode)


def jpeg_2000() -> Codec:
    """Return lossy JPEG 2000 (9/7 wavelet) as a bare codestream.

    The quality sets the PSNR of the grey values, from 10 to 100 dB. The encoder accepts whole decibels only. For
    values between them, the grey values are scaled down a little.
    """

    def decibels_and_scale(quality: float) -> tuple[int, float]:
        decibels = 10.0 + 90.0 * quality
        return math.ceil(decibels), 10 ** ((decibels - math.ceil(decibels)) / 20)

    def encode(grey: Grey, quality: float) -> bytes:
        decibels, scale = decibels_and_scale(quality)
        plane = _integers(grey * scale)
        return bytes(
            imagecodecs.jpeg2k_encode(plane, level=decibels, codecformat="j2k", reversible=False, numthreads=1)
        )

    def decode(code: bytes, quality: float) -> Grey:
        return np.asarray(imagecodecs.jpeg2k_decode(code, numthreads=1), np.float64) / decibels_and_scale(quality)[1]

    return Codec(encode, decode)


CODECS = {"jpeg_xl": jpeg_xl(), "jpeg_2000": jpeg_2000()}


def code_tile(reflectance_CHW: NDArray[np.float64], max_bytes: int, codec: Codec) -> CodedTile | None:
    """Code a tile in at most `max_bytes` over all bands and decode it; None if even the coarsest quality is too large.

    All bands share one scale, from the lowest to the highest value, and one quality. The bands that vary most
    therefore get most bits, which for JPEG 2000 minimises the squared error of reflectance. At most ten qualities are
    tried. The result is the largest code that fits, or the first that fills 98 % of the bytes.
    """
    low, high = (float(np.float32(end)) for end in (reflectance_CHW.min(), reflectance_CHW.max()))
    step = max(high - low, 1e-9) / FULL_SCALE
    best = _search(codec, (reflectance_CHW - low) / step, max_bytes - HEADER_BYTES)
    if best is None:
        return None
    codes, quality = best
    decoded = np.stack([codec.decode(code, quality) for code in codes])
    return CodedTile(decoded * step + low, sum(map(len, codes)) + HEADER_BYTES)


def _search(codec: Codec, grey_CHW: Grey, max_bytes: int) -> tuple[list[bytes], float] | None:
    """Return the largest codes that fit, and their quality.

    The search works on logarithms of sizes, because sizes grow about exponentially with the quality.
    """
    best, best_bytes, goal = None, 0, math.log(max(max_bytes, 1) * SUFFICIENT_SHARE**0.5)
    # (quality, log bytes) of the best code that fits and of the smallest code that does not; both are guesses at first
    fits, exceeds = (0.0, math.log(FEWEST_BYTES * len(grey_CHW))), (1.0, math.log(2.0 * grey_CHW.size))
    for attempt in range(MAX_TRIES):
        share = (goal - fits[1]) / max(exceeds[1] - fits[1], 1e-9)
        if attempt % 3 == 2:
            share = 0.5  # the false position method alone can converge slowly
        quality = fits[0] + min(max(share, 0.03), 0.97) * (exceeds[0] - fits[0])
        codes = [codec.encode(plane, quality) for plane in grey_CHW]
        num_bytes = sum(map(len, codes))
        if num_bytes > max_bytes:
            exceeds = quality, math.log(num_bytes)
            continue
        fits = quality, math.log(num_bytes)
        if num_bytes > best_bytes:
            best, best_bytes = (codes, quality), num_bytes
        if num_bytes >= SUFFICIENT_SHARE * max_bytes:
            break
    return best


def _integers(grey: Grey) -> NDArray[np.uint16]:
    return grey.round().clip(0, FULL_SCALE).astype(np.uint16)
