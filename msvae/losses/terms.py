"""Terms of the loss. Each one is a sum and a count over leaf elements. B batch, C bands, H, W pixels.

`valid` (B, C, H, W) is a bool mask of the elements that count. Values where it is False never matter, NaN included.
Totals are float32 (float64 for float64 images). They are in reflectance, or in units of `unit_C` (C,) if the function
has that argument. The squared error and the spectral angle are in `msvae.losses.spectra`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import huber_loss, relu

from msvae.bands import MIN_INDEX_SUM

MIN_NORM = 1e-6
"""Smallest norm of a spectrum, in reflectance, that defines a direction."""


@dataclass(frozen=True)
class MaskedSum:
    """Total over valid elements and the number of these elements. Both have the shape () or (C,).

    Ranks and micro batches are combined by adding totals and counts. The total is divided by the count once, at the
    end.
    """

    total: Tensor
    count: Tensor

    def mean(self) -> Tensor:
        """Return total / count element by element; 0 where the count is 0."""
        return _ratio(self.total, self.count)

    def overall(self) -> Tensor:
        """Return the mean over bands of the mean of each band, (), over the bands that have valid elements."""
        return divide_once(self.total, self.count)


def divide_once(total: Tensor, count: Tensor) -> Tensor:
    """Return the mean of per-band means, (), over the bands that have valid elements."""
    return _ratio(total, count).sum() / torch.count_nonzero(count).clamp(min=1)


def absolute_error(recon_BCHW: Tensor, target_BCHW: Tensor, valid_BCHW: Tensor, unit_C: Tensor) -> MaskedSum:
    """Absolute error per band over valid elements, (C,), in units of `unit_C`."""
    error = _standardised_error(recon_BCHW, target_BCHW, valid_BCHW, unit_C)
    return _per_band(error.abs(), valid_BCHW)


def huber_error(recon_BCHW: Tensor, target_BCHW: Tensor, valid_BCHW: Tensor, unit_C: Tensor) -> MaskedSum:
    """Huber loss per band over valid elements, (C,).

    The loss is half the squared error up to an error of one `unit_C` and linear above it (Huber 1964).
    """
    error = _standardised_error(recon_BCHW, target_BCHW, valid_BCHW, unit_C)
    return _per_band(huber_loss(error, torch.zeros_like(error), reduction="none"), valid_BCHW)


def range_excess(recon_BCHW: Tensor, valid_BCHW: Tensor, unit_C: Tensor) -> MaskedSum:
    """Squared distance of reconstructed reflectance from the interval 0 to 1 per band, (C,), in units of `unit_C`."""
    recon = _select(valid_BCHW, recon_BCHW)
    excess = (relu(-recon) + relu(recon - 1)) / unit_C[:, None, None]
    return _per_band(excess.square(), valid_BCHW)


def signature_error(recon_BCHW: Tensor, target_BCHW: Tensor, valid_BCHW: Tensor, unit_C: Tensor) -> MaskedSum:
    """Squared error of the mean leaf spectrum of each tile per band, (C,), in units of `unit_C`.

    Each tile is weighted by its number of valid elements, so that a nearly empty tile counts less than a full one.
    """
    error_BC = _standardised_error(recon_BCHW, target_BCHW, valid_BCHW, unit_C).sum(dim=(2, 3))
    count_BC = valid_BCHW.sum(dim=(2, 3))
    return MaskedSum((error_BC.square() / count_BC.clamp(min=1)).sum(dim=0), count_BC.sum(dim=0))


def cosine_distance(recon_BCHW: Tensor, target_BCHW: Tensor, has_spectrum_BHW: Tensor) -> MaskedSum:
    """`1 - cos` of the spectral angle, (), over the pixels of `has_spectrum`.

    It is computed as half the squared distance of unit vectors, which is exact near 0. A reconstructed spectrum of 0
    has the distance 1 and no gradient.
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
    """Absolute error of normalised differences such as NDVI, (number of pairs,).

    The index of a pair of bands (a, b) is (a - b) / (a + b). As in the metrics, reflectance below 0 counts as 0. The
    count of a pair is the number of pixels where both bands are valid.
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
    """KL divergence of the posterior from N(0, 1). Each latent cell is weighted by its leaf share.

    Args: mean and log variance (B, latent channels, h, w); leaf share (B, h, w), 0 to 1.
    Returns: sum over cells and channels in nats, and sum of leaf shares; both ().
    """
    mean, logvar = upcast(mean), upcast(logvar)
    per_cell = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(dim=1)
    return MaskedSum(torch.where(leaf_share_Bhw > 0, per_cell * leaf_share_Bhw, 0.0).sum(), leaf_share_Bhw.sum())


def upcast(values: Tensor) -> Tensor:
    """Convert half precision to float32. float32 and float64 are returned unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _ratio(total: Tensor, count: Tensor) -> Tensor:
    """Return total / count; 0 where the count is 0. Counts of latent cells are fractions, so they may be below 1."""
    return torch.where(count > 0, total / torch.where(count > 0, count, 1), 0.0)


def _standardised_error(recon: Tensor, target: Tensor, valid: Tensor, unit_C: Tensor) -> Tensor:
    return (_select(valid, recon) - _select(valid, target)) / unit_C[:, None, None]


def _per_band(map_BCHW: Tensor, valid_BCHW: Tensor) -> MaskedSum:
    return MaskedSum(map_BCHW.sum(dim=(0, 2, 3)), valid_BCHW.sum(dim=(0, 2, 3)))


def _select(valid: Tensor, values: Tensor) -> Tensor:
    return torch.where(valid, upcast(values), 0.0)


def _normalised_difference(a: Tensor, b: Tensor) -> Tensor:
    a, b = relu(a), relu(b)
    return (a - b) / (a + b).clamp(min=MIN_INDEX_SUM)
