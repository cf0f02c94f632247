"""JPEG XL and JPEG 2000 at a given rate: each band of a tile as a grey image of 16 bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import imagecodecs
import numpy as np
from numpy.typing import NDArray

HEADER_BYTES = 8
"""The reflectances of the grey values 0 and 65535, one pair a tile, float32."""
CLOSE = 0.98
"""Share of the allowed bytes that is near enough."""
MAX_TRIES = 10
FEWEST_BYTES = 60
"""Of a code, roughly, at the coarsest quality."""
FULL_SCALE = 65535

Grey = NDArray[np.float64]
"""(H, W), 0 to 65535."""


class Codec(NamedTuple):
    """An encoder of grey images at a quality from 0, its coarsest, to 1; its decoder is told the quality."""

    encode: Callable[[Grey, float], bytes]
    decode: Callable[[bytes, float], Grey]


@dataclass(frozen=True)
class Coded:
    """A tile that was coded: reflectance (C, H, W), and the bytes that it took, header included."""

    reflectance: NDArray[np.float64]
    num_bytes: int


def jpeg_xl() -> Codec:
    """Lossy JPEG XL; quality is the logarithm of its Butteraugli distance, from 25 to 0.01. Effort 5 of 9."""

    def encode(grey: Grey, quality: float) -> bytes:
        distance = 25.0 * (0.01 / 25.0) ** quality
        return bytes(imagecodecs.jpegxl_encode(_integers(grey), distance=distance, effort=5, numthreads=1))

    def decode(code: bytes, _: float) -> Grey:
        return np.asarray(imagecodecs.jpegxl_decode(code, numthreads=1), np.float64)

    return Codec(encode, decode)


def jpeg_2000() -> Codec:
    """Lossy JPEG 2000 (9/7 wavelet), a bare codestream; quality is its PSNR, from 10 to 100 dB of the grey values.

    The encoder takes whole decibels: grey values are made a little smaller for what lies between.
    """

    def level(quality: float) -> tuple[int, float]:
        decibels = 10.0 + 90.0 * quality
        return math.ceil(decibels), 10 ** ((decibels - math.ceil(decibels)) / 20)

    def encode(grey: Grey, quality: float) -> bytes:
        decibels, size = level(quality)
        plane = _integers(grey * size)
        return bytes(
            imagecodecs.jpeg2k_encode(plane, level=decibels, codecformat="j2k", reversible=False, numthreads=1)
        )

    def decode(code: bytes, quality: float) -> Grey:
        return np.asarray(imagecodecs.jpeg2k_decode(code, numthreads=1), np.float64) / level(quality)[1]

    return Codec(encode, decode)


CODECS = {"jpeg_xl": jpeg_xl(), "jpeg_2000": jpeg_2000()}


def at_rate(reflectance_CHW: NDArray[np.float64], max_bytes: int, codec: Codec) -> Coded | None:
    """A tile in as many bytes as allowed or a little less, over all bands; None when it cannot be so small.

    All bands share one scale, from the lowest to the highest value, and one quality, so that bits go to the bands that
    vary most: for JPEG 2000 that is the smallest squared error of reflectance. The largest of at most ten tries that
    fits is taken, or the first that fills 98 %.
    """
    low, high = (float(np.float32(end)) for end in (reflectance_CHW.min(), reflectance_CHW.max()))
    step = max(high - low, 1e-9) / FULL_SCALE
    found = _search(codec, (reflectance_CHW - low) / step, max_bytes - HEADER_BYTES)
    if found is None:
        return None
    codes, quality = found
    decoded = np.stack([codec.decode(code, quality) for code in codes])
    return Coded(decoded * step + low, sum(map(len, codes)) + HEADER_BYTES)


def _search(codec: Codec, grey_CHW: Grey, max_bytes: int) -> tuple[list[bytes], float] | None:
    """The largest codes that fit, and their quality. Bytes grow about exponentially with it: hence logarithms."""
    best, best_bytes, goal = None, 0, math.log(max(max_bytes, 1) * CLOSE**0.5)
    # quality and log bytes that fit and that do not; guessed before there are any
    fits, exceeds = (0.0, math.log(FEWEST_BYTES * len(grey_CHW))), (1.0, math.log(2.0 * grey_CHW.size))
    for attempt in range(MAX_TRIES):
        share = (goal - fits[1]) / max(exceeds[1] - fits[1], 1e-9)
        if attempt % 3 == 2:
            share = 0.5  # false position alone may creep along one side
        quality = fits[0] + min(max(share, 0.03), 0.97) * (exceeds[0] - fits[0])
        codes = [codec.encode(plane, quality) for plane in grey_CHW]
        num_bytes = sum(map(len, codes))
        if num_bytes > max_bytes:
            exceeds = quality, math.log(num_bytes)
            continue
        fits = quality, math.log(num_bytes)
        if num_bytes > best_bytes:
            best, best_bytes = (codes, quality), num_bytes
        if num_bytes >= CLOSE * max_bytes:
            break
    return best


def _integers(grey: Grey) -> NDArray[np.uint16]:
    return grey.round().clip(0, FULL_SCALE).astype(np.uint16)
