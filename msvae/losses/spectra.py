"""Squared error and spectral angle of leaf pixels, computed together in one pass over the tiles.

B batch, C bands, H, W pixels. The gradient is written by hand, so that autograd saves only the inputs. On a CPU the
pass runs block by block, so that intermediate values stay in the cache. When compiled, the forward pass is one kernel
and the backward pass is another one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from msvae.losses.terms import MIN_NORM, MaskedSum, upcast

BLOCK_PIXELS = 2**16
"""Number of pixels that a CPU processes at once."""
MIN_REJECTION = 1e-10
"""Smallest norm of the rejection of a spectrum from its target, in reflectance, that defines a direction."""
MIN_PROJECTION = 1e-12
"""Smallest projection onto the target, in norms of the target. Below it the angle is computed as a right angle."""

_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
_WHOLE = (slice(None), slice(None), slice(None))

Block = tuple[slice, slice, slice]


def error_and_angle(recon_BCHW: Tensor, target_BCHW: Tensor, leaf_mask: Tensor) -> tuple[MaskedSum, MaskedSum]:
    """Squared error per band over finite leaf elements, and spectral angle over leaf pixels that have a spectrum.

    Only the reconstruction has a gradient. The gradient of the angle is 0 where it has no direction: for equal,
    opposite and zero spectra. The angle between a zero spectrum and any other spectrum is pi / 2.

    Args: reconstruction and target (B, C, H, W), reflectance; leaf mask (B, 1|C, H, W) bool. Values off the leaf never
        matter, NaN included.
    Returns: sums and counts of the squared error, (C,), reflectance squared, and of the angle, (), radians. Sums are
        float32, or float64 for float64 images.
    """
    error, elements, angle, spectra = _apply(recon_BCHW, target_BCHW, leaf_mask, True)
    return MaskedSum(error, elements), MaskedSum(angle, spectra)


def squared_error(recon_BCHW: Tensor, target_BCHW: Tensor, leaf_mask: Tensor) -> MaskedSum:
    """Squared error per band over finite leaf elements, as in `error_and_angle`.

    Args: reconstruction and target (B, C, H, W), reflectance; leaf mask (B, 1|C, H, W) bool.
    Returns: sums and counts, each (C,), reflectance squared.
    """
    error, elements, _, _ = _apply(recon_BCHW, target_BCHW, leaf_mask, False)
    return MaskedSum(error, elements)


def count_elements_and_spectra(target_BCHW: Tensor, leaf_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two counts of `error_and_angle`, (C,) and (), int64. They depend on the target alone."""
    counts = []
    for block in _blocks(target_BCHW):
        target, mask = target_BCHW[block], leaf_mask[block]
        v = [upcast(band) for band in target.unbind(1)]
        counts.append((_count(_valid(target, mask)), _total(_has_spectrum(_dot(v, v), mask))))
    elements, spectra = zip(*counts, strict=True)
    return torch.stack(elements).sum(dim=0), torch.stack(spectra).sum(dim=0)


def count_nonfinite(target_BCHW: Tensor, leaf_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of leaf elements of the target that are not finite, and of all leaf elements; (), int64."""
    leaf = leaf_mask.sum() * (target_BCHW.shape[1] // leaf_mask.shape[1])
    valid = [_count(_valid(target_BCHW[b], leaf_mask[b])).sum() for b in _blocks(target_BCHW)]
    return leaf - torch.stack(valid).sum(), leaf


def has_spectrum(target_BCHW: Tensor, leaf_mask: Tensor) -> Tensor:
    """Return which leaf pixels have a spectral angle, (B, H, W) bool: all bands are finite and their norm is not 0."""
    v = [upcast(band) for band in target_BCHW.unbind(1)]
    return _has_spectrum(_dot(v, v), leaf_mask)


class _Decomposition:
    """Decomposition of reconstructed spectra u = t v + r. The target is v, and the rejection r is orthogonal to v.

    The angle is atan2(|r|, t |v|). It is exact near 0, where acos loses all digits and has an infinite slope. Spectra
    are lists of bands.
    """

    def __init__(self, recon: Tensor, target: Tensor, leaf_mask: Tensor) -> None:
        self.u, self.v = ([upcast(band) for band in spectra.unbind(1)] for spectra in (recon, target))
        self.norm2_v = _dot(self.v, self.v)
        self.has_spectrum = _has_spectrum(self.norm2_v, leaf_mask)
        self.t = _select(self.has_spectrum, _dot(self.u, self.v) / self.norm2_v)
        self.r = [torch.addcmul(u, self.t, v, value=-1) for u, v in zip(self.u, self.v, strict=True)]
        self.norm2_r = _dot(self.r, self.r)

    def angle(self) -> Tensor:
        """Return the angle of each pixel in radians, (B, H, W); 0 where the target has no spectrum."""
        sine = torch.where(self.t.abs() < MIN_PROJECTION, 1.0, self.norm2_r.sqrt())
        return _select(self.has_spectrum, torch.atan2(sine, self.t * self.norm2_v.sqrt()))

    def factors(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the factors of r and v in the gradient of the angle, (t |v| r / |r| - |r| v / |v|) / |u|^2."""
        norm2_u = torch.addcmul(self.norm2_r, self.t.square(), self.norm2_v)
        # for parallel spectra r is a rounding error, and its direction is noise
        rounding2 = len(self.u) * (4 * torch.finfo(norm2_u.dtype).eps) ** 2
        has_direction = self.norm2_r > rounding2 * norm2_u + MIN_REJECTION**2
        scale = _select(has_direction, gradient / (norm2_u * (self.norm2_r * self.norm2_v).sqrt()))
        of_r, of_v = scale * self.t * self.norm2_v, -scale * self.norm2_r
        return _select(self.has_spectrum, of_r), _select(self.has_spectrum, of_v)


class _ErrorAndAngle(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, recon: Tensor, target: Tensor, leaf_mask: Tensor, with_angle: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(recon, target, leaf_mask)
        ctx.with_angle = with_angle
        parts = [_sums(recon[b], target[b], leaf_mask[b], with_angle) for b in _blocks(recon)]
        error, elements, angle, spectra = (torch.stack(part).sum(dim=0) for part in zip(*parts, strict=True))
        ctx.mark_non_differentiable(elements, spectra)
        return error, elements, angle, spectra

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, error: Tensor, _: Tensor, angle: Tensor, __: Tensor) -> tuple[Tensor, None, None, None]:
        recon, target, leaf_mask = ctx.saved_tensors
        gradient = torch.empty_like(recon)
        for b in _blocks(recon):
            bands = _gradient(recon[b], target[b], leaf_mask[b], error, angle if ctx.with_angle else None)
            gradient[b] = torch.stack(bands, dim=1)
        return gradient, None, None, None


def _apply(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sums: tuple[Tensor, Tensor, Tensor, Tensor] = _ErrorAndAngle.apply(*arguments)  # type: ignore[no-untyped-call]
    return sums


def _sums(recon: Tensor, target: Tensor, leaf_mask: Tensor, with_angle: bool) -> tuple[Tensor, ...]:
    valid = _valid(target, leaf_mask)
    bands = zip(valid, recon.unbind(1), target.unbind(1), strict=True)
    error = torch.stack([_total(_select(ok, upcast(u) - upcast(v)).square()) for ok, u, v in bands])
    if not with_angle:
        return error, _count(valid), error.new_zeros(()), torch.zeros_like(valid[0], dtype=torch.int64).sum()
    spectra = _Decomposition(recon, target, leaf_mask)
    return error, _count(valid), _total(spectra.angle()), _total(spectra.has_spectrum)


def _gradient(recon: Tensor, target: Tensor, leaf_mask: Tensor, error_C: Tensor, angle: Tensor | None) -> list[Tensor]:
    """Return the gradient of each band of the reconstruction, given the gradients of the sums."""
    valid = _valid(target, leaf_mask)
    if angle is None:
        bands = zip(valid, recon.unbind(1), target.unbind(1), 2 * error_C, strict=True)
        return [_select(ok, (upcast(u) - upcast(v)) * slope) for ok, u, v, slope in bands]
    spectra = _Decomposition(recon, target, leaf_mask)
    of_r, of_v = spectra.factors(angle)
    parts = zip(valid, spectra.u, spectra.v, spectra.r, 2 * error_C, strict=True)
    return [_select(ok, ((u - v) * slope).addcmul_(of_r, r).addcmul_(of_v, v)) for ok, u, v, r, slope in parts]


def _in_blocks(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _blocks(tiles: Tensor) -> list[Block]:
    """Return blocks of the tiles that fit into the cache of a CPU; one block if kernels are fused or run on a GPU."""
    if not _in_blocks(tiles):
        return [_WHOLE]
    batch, _, height, width = tiles.shape
    num_tiles, num_rows = max(1, BLOCK_PIXELS // (height * width)), max(1, BLOCK_PIXELS // width)
    return [
        (slice(b, b + num_tiles), slice(None), slice(y, y + num_rows))
        for b in range(0, batch, num_tiles)
        for y in range(0, height, num_rows)
    ]


def _valid(target: Tensor, leaf_mask: Tensor) -> list[Tensor]:
    """Return which elements of each band are leaf and finite, as C planes (B, H, W).

    All planes are the same object if the mask has one plane and all values are finite.
    """
    num_bands = target.shape[1]
    planes = list(leaf_mask.unbind(1)) * (num_bands // leaf_mask.shape[1])
    if _in_blocks(target) and bool(target.sum().isfinite()):
        return planes
    return [plane & (band.abs() < math.inf) for plane, band in zip(planes, target.unbind(1), strict=True)]


def _has_spectrum(norm2_v: Tensor, leaf_mask: Tensor) -> Tensor:
    """Return which pixels are leaf in all bands and have a finite spectrum with a norm above `MIN_NORM`."""
    has_spectrum = (norm2_v > MIN_NORM**2) & (norm2_v < math.inf)
    for plane in leaf_mask.unbind(1):
        has_spectrum = has_spectrum & plane
    return has_spectrum


def _select(valid: Tensor, values: Tensor) -> Tensor:
    """Return values where `valid` is True, else 0.

    On a CPU, a bit mask is applied to the values. It sets NaN to 0 too, and is many times faster than `where`.
    """
    if not _in_blocks(values):
        return torch.where(valid, values, 0.0)
    integers = _INTEGERS[values.dtype]
    return values.view(integers).bitwise_and(valid.to(integers).neg_()).view(values.dtype)


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    dot = first[0] * second[0]
    for a, b in zip(first[1:], second[1:], strict=True):
        dot.addcmul_(a, b)
    return dot


def _count(valid: Sequence[Tensor]) -> Tensor:
    if valid[0] is valid[-1]:
        return _total(valid[0]).expand(len(valid))
    return torch.stack([_total(plane) for plane in valid])


def _total(map_BHW: Tensor) -> Tensor:
    """Return the sum over pixels, added tile by tile, so that all sums of a compiled pass share one loop."""
    return map_BHW.sum(dim=(1, 2)).sum()
