"""The terms of the loss, each a sum and a count over leaf elements only. B batch, C bands, H, W pixels.

Gradients are written out: they need two maps a pixel where autograd would keep a dozen copies of the tiles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from msvae.losses.masked_sum import MaskedSum


def squared_error(recon_BCHW: Tensor, target_BCHW: Tensor, valid_BCHW: Tensor) -> MaskedSum:
    """Squared error per band over valid elements.

    Args: three (B, C, H, W) tensors; `valid` is bool. Values where it is False never matter, NaN included.
    Returns: sums and counts, each (C,), float32, reflectance squared. Only the reconstruction gets a gradient.
    """
    total: Tensor = _SquaredError.apply(recon_BCHW, target_BCHW, valid_BCHW)  # type: ignore[no-untyped-call]
    return MaskedSum(total, valid_BCHW.sum(dim=(0, 2, 3)))


def spectral_angle(recon_BCHW: Tensor, target_BCHW: Tensor, valid_BHW: Tensor) -> MaskedSum:
    """Angle between reconstructed and target spectrum, over pixels with a valid spectrum.

    Returns: sum of angles in radians, float32, and number of pixels, each ().
    """
    return MaskedSum(angle_rad(recon_BCHW, target_BCHW, valid_BHW).sum(), valid_BHW.sum())


def angle_rad(recon_BCHW: Tensor, target_BCHW: Tensor, valid_BHW: Tensor) -> Tensor:
    """Angle between spectra along dim 1, (B, H, W), in radians; 0 where not valid.

    `2 atan2(|u' - v'|, |u' + v'|)` of unit vectors (Kahan 2006): exact near 0, where acos loses every digit and
    has an infinite slope. A zero spectrum stands at pi / 2 to every other. Only the reconstruction gets a gradient,
    0 where it has no direction: at equal, opposite and zero spectra.
    """
    angle: Tensor = _SpectralAngle.apply(recon_BCHW, target_BCHW, valid_BHW)  # type: ignore[no-untyped-call]
    return angle


def kl_divergence(mean: Tensor, logvar: Tensor, leaf_share_Bhw: Tensor) -> MaskedSum:
    """KL divergence of the posterior from N(0, 1), latent cells weighted by their leaf share.

    Args: mean and logvar (B, latent channels, h, w); leaf share (B, h, w) in 0..1.
    Returns: sum over cells and channels in nats, and sum of leaf shares, each ().
    """
    mean, logvar = mean.float(), logvar.float()
    per_cell = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=1)
    return MaskedSum(torch.where(leaf_share_Bhw > 0, per_cell * leaf_share_Bhw, 0.0).sum(), leaf_share_Bhw.sum())


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recon: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        ctx.save_for_backward(recon, target, valid)
        bands = zip(recon.unbind(1), target.unbind(1), valid.unbind(1), strict=True)
        return torch.stack([_difference(*band).square_().sum() for band in bands])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_C: Tensor) -> tuple[Tensor, None, None]:
        recon, target, valid = ctx.saved_tensors
        gradient = _difference(recon, target, valid).mul_(2 * gradient_C[:, None, None])
        return gradient.to(recon.dtype), None, None


class _SpectralAngle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, recon: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        u, v = ([_exact(band) for band in spectra.unbind(1)] for spectra in (recon, target))
        inverse_u, inverse_v = _inverse_norm(u), _inverse_norm(v)
        minus, plus = torch.zeros_like(inverse_u), torch.zeros_like(inverse_u)
        for u_c, v_c in zip(u, v, strict=True):
            unit_u, unit_v = u_c * inverse_u, v_c * inverse_v
            difference = unit_u - unit_v
            total = unit_u.add_(unit_v)
            minus.addcmul_(difference, difference)
            plus.addcmul_(total, total)
        # with unit vectors, sin = sqrt(minus * plus) / 2 and cos = 1 - minus / 2;
        # the gradient is (cos u' - v') / (|u| sin), a combination of u and v with two factors a pixel
        product = minus * plus
        slope = torch.where(product == 0, 0.0, 2 * inverse_u * product.rsqrt())
        factor_u, factor_v = slope * inverse_u * (1 - minus / 2), -slope * inverse_v
        ctx.save_for_backward(recon, target, valid, factor_u, factor_v)
        return torch.where(valid, 2 * torch.atan2(minus.sqrt_(), plus.sqrt_()), 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BHW: Tensor) -> tuple[Tensor, None, None]:
        recon, target, valid, factor_u, factor_v = ctx.saved_tensors
        factor_u, factor_v = gradient_BHW * factor_u, gradient_BHW * factor_v
        gradient = torch.empty_like(recon)
        for band, u_c, v_c in zip(gradient.unbind(1), recon.unbind(1), target.unbind(1), strict=True):
            band.copy_(torch.where(valid, factor_u * u_c + factor_v * v_c, 0.0))
        return gradient, None, None


def _exact(values: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _difference(recon: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, _exact(recon) - _exact(target), 0.0)


def _inverse_norm(bands: list[Tensor]) -> Tensor:
    """1 / length of each spectrum, 0 for a zero spectrum."""
    squared = bands[0].square()
    for band in bands[1:]:
        squared.addcmul_(band, band)
    return torch.where(squared == 0, 0.0, squared.rsqrt())
