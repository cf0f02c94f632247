"""Further terms of the loss, each a sum and a count over leaf elements only. B batch, C bands, H, W pixels.

`valid` (B, C, H, W) bool says which elements count; values where it is False never matter, NaN included. Totals are
float32, in reflectance; where `unit_C` is given, in units of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, relu

from msvae.bands import MIN_INDEX_SUM
from msvae.losses.masked_sum import MaskedSum

MIN_NORM = 1e-6
"""Shortest reconstructed spectrum, in reflectance, that has a direction."""


def absolute_error(recon_BCHW: Tensor, target_BCHW: Tensor, valid_BCHW: Tensor, unit_C: Tensor) -> MaskedSum:
    """Absolute error per band, (C,)."""
    error = _standardised_error(recon_BCHW, target_BCHW, valid_BCHW, unit_C)
    return _per_band(error.abs(), valid_BCHW)


def huber_error(recon_BCHW: Tensor, target_BCHW: Tensor, valid_BCHW: Tensor, unit_C: Tensor) -> MaskedSum:
    """Huber's error per band, (C,): half the square up to one unit, linear beyond (Huber 1964)."""
    error = _standardised_error(recon_BCHW, target_BCHW, valid_BCHW, unit_C)
    return _per_band(huber_loss(error, torch.zeros_like(error), reduction="none"), valid_BCHW)


def range_excess(recon_BCHW: Tensor, valid_BCHW: Tensor, unit_C: Tensor) -> MaskedSum:
    """Squared distance of reconstructed reflectance from 0..1 per band, (C,)."""
    recon = _select(valid_BCHW, recon_BCHW)
    excess = (relu(-recon) + relu(recon - 1)) / unit_C[:, None, None]
    return _per_band(excess.square(), valid_BCHW)


def signature_error(recon_BCHW: Tensor, target_BCHW: Tensor, valid_BCHW: Tensor, unit_C: Tensor) -> MaskedSum:
    """Squared error of each tile's mean leaf spectrum against the target's own, per band, (C,).

    A tile weighs as much as it has valid elements, so nearly empty tiles do not count like full ones.
    """
    error_BC = _standardised_error(recon_BCHW, target_BCHW, valid_BCHW, unit_C).sum(dim=(2, 3))
    count_BC = valid_BCHW.sum(dim=(2, 3))
    return MaskedSum((error_BC.square() / count_BC.clamp(min=1)).sum(dim=0), count_BC.sum(dim=0))


def cosine_distance(recon_BCHW: Tensor, target_BCHW: Tensor, has_spectrum_BHW: Tensor) -> MaskedSum:
    """`1 - cos` of the spectral angle, (), over pixels that have a spectrum.

    Half the squared distance of unit vectors, which keeps its digits near 0; 1, without gradient, for a zero spectrum.
    """
    u, v = (_select(has_spectrum_BHW[:, None], spectra) for spectra in (recon_BCHW, target_BCHW))
    norm2_u, norm2_v = (spectra.square().sum(dim=1, keepdim=True) for spectra in (u, v))
    has_direction = ~(norm2_u < MIN_NORM**2)
    unit_u = u * torch.where(has_direction, norm2_u, 1.0).rsqrt()
    unit_v = v * torch.where(norm2_v > 0, norm2_v, 1.0).rsqrt()
    distance = torch.where(has_direction, (unit_u - unit_v).square().sum(dim=1, keepdim=True) / 2, 1.0)
    return MaskedSum(_select(has_spectrum_BHW, distance[:, 0]).sum(), has_spectrum_BHW.sum())


def index_error(
    recon_BCHW: Tensor, target_BCHW: Tensor, valid_BCHW: Tensor, pairs: Sequence[tuple[int, int]]
) -> MaskedSum:
    """Absolute error of normalised differences such as NDVI, one entry a pair of bands (a, b): (a - b) / (a + b).

    Counts: pixels at which both bands are valid. As in the metrics, reflectance under 0 counts as 0.
    """
    totals, counts = [], []
    for a, b in pairs:
        valid = valid_BCHW[:, a] & valid_BCHW[:, b]
        recon, target = (
            _normalised_difference(_select(valid, x[:, a]), _select(valid, x[:, b])) for x in (recon_BCHW, target_BCHW)
        )
        totals.append((recon - target).abs().sum())
        counts.append(valid.sum())
    return MaskedSum(torch.stack(totals), torch.stack(counts))


def kl_divergence(mean: Tensor, logvar: Tensor, leaf_share_Bhw: Tensor) -> MaskedSum:
    """KL divergence of the posterior from N(0, 1), latent cells weighted by their leaf share.

    Args: mean and logvar (B, latent channels, h, w); leaf share (B, h, w) in 0..1.
    Returns: sum over cells and channels in nats, and sum of leaf shares, each ().
    """
    mean, logvar = _exact(mean), _exact(logvar)
    per_cell = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=1)
    return MaskedSum(torch.where(leaf_share_Bhw > 0, per_cell * leaf_share_Bhw, 0.0).sum(), leaf_share_Bhw.sum())


def _standardised_error(recon: Tensor, target: Tensor, valid: Tensor, unit_C: Tensor) -> Tensor:
    return (_select(valid, recon) - _select(valid, target)) / unit_C[:, None, None]


def _per_band(map_BCHW: Tensor, valid_BCHW: Tensor) -> MaskedSum:
    return MaskedSum(map_BCHW.sum(dim=(0, 2, 3)), valid_BCHW.sum(dim=(0, 2, 3)))


def _select(valid: Tensor, values: Tensor) -> Tensor:
    return torch.where(valid, _exact(values), 0.0)


def _exact(values: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _normalised_difference(a: Tensor, b: Tensor) -> Tensor:
    a, b = relu(a), relu(b)
    return (a - b) / (a + b).clamp(min=MIN_INDEX_SUM)
