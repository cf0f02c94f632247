"""Initialisation of adapters: at random, or as a projection of spectra onto three channels and back."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from msvae.bands import Bands, LeafStatistics
from msvae.model.adapters import BandAdapter

SMALLEST_STD = 1e-6
"""Smallest standard deviation of a band, in reflectance. A constant band would otherwise be divided by 0."""
CHANNEL_SPREAD = 0.5
"""Standard deviation of each projected channel. The backbone was trained on values from -1 to 1."""


@torch.no_grad()
def initialise_from_backbone(
    model: AutoencoderKL, backbone: AutoencoderKL, adapter_init: str, statistics: LeafStatistics | None
) -> None:
    """Copy the weights of a backbone into a model, and initialise its adapters.

    `rgb` and `pca` set adapters to a linear projection; `random` leaves them unchanged. On a side without an adapter,
    the projection is multiplied into the first or last convolution of the backbone. For `random`, this projection
    repeats RGB over the bands.

    Raises: ValueError if `adapter_init` is unknown, or if it needs statistics or linear maps that are missing.
    """
    inwards, outwards = (torch.from_numpy(p).float() for p in _projection(model.bands, adapter_init, statistics))
    state = dict(backbone.float().state_dict())
    if model.input_adapter is None:
        state["encoder.conv_in.weight"] = torch.einsum("orhw,rc->ochw", state["encoder.conv_in.weight"], inwards)
    elif adapter_init != "random":
        _set_linear(model.input_adapter, inwards, adapter_init)
    if model.output_adapter is None:
        state["decoder.conv_out.weight"] = torch.einsum("cr,rihw->cihw", outwards, state["decoder.conv_out.weight"])
        state["decoder.conv_out.bias"] = outwards @ state["decoder.conv_out.bias"]
    elif adapter_init != "random":
        _set_linear(model.output_adapter, outwards, adapter_init)
    missing, unexpected = model.load_state_dict(state, strict=False)
    new = ("input_adapter.", "output_adapter.", "input_attention.", "output_attention.")
    assert not unexpected and all(name.startswith(new) for name in missing), (missing, unexpected)


def repeating_projection(num_bands: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a projection that repeats RGB over the bands, (3, C) inwards and (C, 3) outwards.

    Equal values in all bands have the same effect as equal values in RGB.
    """
    repeated = np.eye(3)[np.arange(num_bands) % 3]
    return repeated.T * 3 / num_bands, repeated


def pca_projection(bands: Bands, statistics: LeafStatistics) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the projection onto the first three principal components of leaf reflectance.

    Returns: linear maps of standardised bands, (3, C) inwards and (C, 3) outwards.
    """
    std = _standard_deviations(statistics)
    eigenvalues, eigenvectors = np.linalg.eigh(np.asarray(statistics.covariance))
    components = eigenvectors[:, ::-1][:, :3]
    spread = np.sqrt(np.maximum(eigenvalues[::-1][:3], 1e-12)) / CHANNEL_SPREAD
    inwards, outwards = np.zeros((3, len(bands))), np.zeros((len(bands), 3))
    inwards[: components.shape[1]] = (components / spread).T * std
    outwards[:, : components.shape[1]] = components * spread / std[:, None]
    return inwards, outwards


def rgb_projection(bands: Bands, statistics: LeafStatistics) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the projection that selects red, green and blue, and predicts the other bands by least squares.

    Returns: linear maps of standardised bands, (3, C) inwards and (C, 3) outwards.
    """
    std = _standard_deviations(statistics)
    correlation = np.asarray(statistics.covariance) / np.outer(std, std)
    rgb = [bands.index(role) for role in ("red", "green", "blue")]
    inwards = np.zeros((3, len(bands)))
    inwards[range(3), rgb] = CHANNEL_SPREAD
    outwards = correlation[:, rgb] @ np.linalg.pinv(correlation[np.ix_(rgb, rgb)])
    outwards[rgb] = np.eye(3)
    return inwards, outwards / CHANNEL_SPREAD


def _projection(
    bands: Bands, adapter_init: str, statistics: LeafStatistics | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if adapter_init == "random":
        return repeating_projection(len(bands))
    if adapter_init not in ("rgb", "pca"):
        raise ValueError(f"adapter_init is {adapter_init!r}, expected `random`, `rgb` or `pca`")
    if statistics is None:
        raise ValueError(f"adapter_init `{adapter_init}` needs the leaf statistics of a manifest; pass statistics=…")
    return (rgb_projection if adapter_init == "rgb" else pca_projection)(bands, statistics)


def _standard_deviations(statistics: LeafStatistics) -> NDArray[np.float64]:
    """Return the standard deviation of each band, at least `SMALLEST_STD`."""
    return np.maximum(statistics.std, SMALLEST_STD)


def _set_linear(adapter: BandAdapter, weight: Tensor, adapter_init: str) -> None:
    if adapter.linear is None:
        raise ValueError(
            f"adapter_init `{adapter_init}` needs a linear map; set adapter_form to `residual`, or adapter_init to "
            "`random`"
        )
    adapter.linear.weight.copy_(weight[:, :, None, None])
    assert adapter.linear.bias is not None
    adapter.linear.bias.zero_()
