"""How adapters begin: at random, or as a projection of the spectrum that is known to be good."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from msvae.bands import Bands
from msvae.leaf_statistics import LeafStatistics
from msvae.model.adapters import BandAdapter

SMALLEST_STD = 1e-6
CHANNEL_SPREAD = 0.5
"""Standard deviation of each channel that a projection hands to the backbone, which was trained on -1..1."""


@torch.no_grad()
def put_backbone(
    model: AutoencoderKL, backbone: AutoencoderKL, bands: Bands, how: str, statistics: LeafStatistics | None
) -> None:
    """Copy a backbone into a model around it, and begin what is new with a projection to three channels and back.

    `rgb` and `pca` make adapters exactly linear; `random` leaves them as they are. Where the model has no adapter, its
    first or last convolution is the backbone's behind the same projection, with `random` that of repeated RGB.
    Raises: ValueError for an unknown name, a projection without statistics, or adapters without a linear map.
    """
    inwards, outwards = (torch.from_numpy(p).float() for p in _project(bands, how, statistics))
    state = dict(backbone.float().state_dict())
    if model.input_adapter is None:
        state["encoder.conv_in.weight"] = torch.einsum("orhw,rc->ochw", state["encoder.conv_in.weight"], inwards)
    elif how != "random":
        _set_linear(model.input_adapter, inwards, how)
    if model.output_adapter is None:
        state["decoder.conv_out.weight"] = torch.einsum("cr,rihw->cihw", outwards, state["decoder.conv_out.weight"])
        state["decoder.conv_out.bias"] = outwards @ state["decoder.conv_out.bias"]
    elif how != "random":
        _set_linear(model.output_adapter, outwards, how)
    missing, unexpected = model.load_state_dict(state, strict=False)
    new = ("input_adapter.", "output_adapter.", "input_attention.", "output_attention.")
    assert not unexpected and all(name.startswith(new) for name in missing), (missing, unexpected)


def _project(
    bands: Bands, how: str, statistics: LeafStatistics | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if how == "random":
        return repeating_projection(len(bands))
    if how not in ("rgb", "pca"):
        raise ValueError(f"adapter_init is {how!r}, expected `random`, `rgb` or `pca`")
    if statistics is None:
        raise ValueError(f"adapter_init `{how}` needs the leaf statistics of a manifest; pass statistics=…")
    return (rgb_projection if how == "rgb" else pca_projection)(bands, statistics)


def repeating_projection(num_bands: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """RGB repeated over the bands, (3, C) inwards and (C, 3) outwards: equal bands give what equal RGB gave."""
    repeated = np.eye(3)[np.arange(num_bands) % 3]
    return repeated.T * 3 / num_bands, repeated


def pca_projection(bands: Bands, statistics: LeafStatistics) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Principal components of reflectance, as maps of standardised bands: (3, C) inwards and (C, 3) outwards."""
    std = _spread(statistics)
    eigenvalues, eigenvectors = np.linalg.eigh(np.asarray(statistics.covariance))
    components = eigenvectors[:, ::-1][:, :3]
    spread = np.sqrt(np.maximum(eigenvalues[::-1][:3], 1e-12)) / CHANNEL_SPREAD
    inwards, outwards = np.zeros((3, len(bands))), np.zeros((len(bands), 3))
    inwards[: components.shape[1]] = (components / spread).T * std
    outwards[:, : components.shape[1]] = components * spread / std[:, None]
    return inwards, outwards


def rgb_projection(bands: Bands, statistics: LeafStatistics) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Red, green and blue as themselves, the other bands by least squares: (3, C) inwards, (C, 3) outwards."""
    std = _spread(statistics)
    correlation = np.asarray(statistics.covariance) / np.outer(std, std)
    rgb = [bands.index(role) for role in ("red", "green", "blue")]
    inwards = np.zeros((3, len(bands)))
    inwards[range(3), rgb] = CHANNEL_SPREAD
    outwards = correlation[:, rgb] @ np.linalg.pinv(correlation[np.ix_(rgb, rgb)])
    outwards[rgb] = np.eye(3)
    return inwards, outwards / CHANNEL_SPREAD


def _spread(statistics: LeafStatistics) -> NDArray[np.float64]:
    """Standard deviation of each band; a constant band counts as barely varying."""
    return np.maximum(statistics.std, SMALLEST_STD)


def _set_linear(adapter: BandAdapter, weight: Tensor, how: str) -> None:
    if adapter.linear is None:
        raise ValueError(
            f"adapter_init `{how}` needs a linear map; set adapter_form to `residual`, or begin at random"
        )
    adapter.linear.weight.copy_(weight[:, :, None, None])
    assert adapter.linear.bias is not None
    adapter.linear.bias.zero_()
