"""The terms of the loss, each a sum and a count over leaf elements only. B batch, C bands, H, W pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from msvae.losses.masked_sum import MaskedSum


def squared_error(recon_BCHW: Tensor, target_BCHW: Tensor, valid_BCHW: Tensor) -> MaskedSum:
    """Squared error per band over valid elements.

    Args: three (B, C, H, W) tensors; `valid` is bool. Values where it is False never matter, NaN included.
    Returns: sums and counts, each (C,), float32, reflectance squared.
    """
    error = torch.where(valid_BCHW, recon_BCHW.float() - target_BCHW.float(), 0.0)
    return MaskedSum(error.square().sum(dim=(0, 2, 3)), valid_BCHW.sum(dim=(0, 2, 3)))


def spectral_angle(recon_BCHW: Tensor, target_BCHW: Tensor, valid_BHW: Tensor) -> MaskedSum:
    """Angle between reconstructed and target spectrum, over pixels with a valid spectrum.

    Returns: sum of angles in radians, float32, and number of pixels, each ().
    """
    angle = angle_rad(
        torch.where(valid_BHW[:, None], recon_BCHW.float(), 1.0),
        torch.where(valid_BHW[:, None], target_BCHW.float(), 1.0),
    )
    return MaskedSum(torch.where(valid_BHW, angle, 0.0).sum(), valid_BHW.sum())


def angle_rad(u_BCHW: Tensor, v_BCHW: Tensor) -> Tensor:
    """Angle between spectra along dim 1, (B, H, W), in radians.

    `2 atan2(|u' - v'|, |u' + v'|)` of unit vectors (Kahan 2006): exact near 0, where acos loses every digit and
    has an infinite slope. A zero spectrum stands at pi / 2 to every other.
    """
    u, v = _unit(u_BCHW), _unit(v_BCHW)
    return 2 * torch.atan2(_norm(u - v), _norm(u + v)).squeeze(1)


def kl_divergence(mean: Tensor, logvar: Tensor, leaf_share_Bhw: Tensor) -> MaskedSum:
    """KL divergence of the posterior from N(0, 1), latent cells weighted by their leaf share.

    Args: mean and logvar (B, latent channels, h, w); leaf share (B, h, w) in 0..1.
    Returns: sum over cells and channels in nats, and sum of leaf shares, each ().
    """
    mean, logvar = mean.float(), logvar.float()
    per_cell = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=1)
    return MaskedSum(torch.where(leaf_share_Bhw > 0, per_cell * leaf_share_Bhw, 0.0).sum(), leaf_share_Bhw.sum())


def _unit(spectra: Tensor) -> Tensor:
    norm = _norm(spectra)
    return spectra / torch.where(norm == 0, 1.0, norm)


def _norm(spectra: Tensor) -> Tensor:
    """Length along dim 1, kept; its gradient at a zero spectrum is 0. A NaN stays one."""
    squared = spectra.square().sum(dim=1, keepdim=True)
    zero = squared == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squared).sqrt())
