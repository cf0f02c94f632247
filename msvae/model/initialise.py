"""How a model begins: the backbone's weights, loaded strictly, and adapters that start as a known projection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

from msvae.bands import Bands
from msvae.shards.manifest import LeafStatistics

if TYPE_CHECKING:
    from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter

TINY_BACKBONE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 16, 32, 64),
    "layers_per_block": 1,
    "latent_channels": 16,
    # one group keeps the ratios between channels, and with them the colour of a leaf
    "norm_num_groups": 1,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""A small backbone of the SD3 VAE's shape (8x down, 16 latent channels), for training from scratch on a CPU."""

SMALLEST_STD = 1e-6
CHANNEL_SPREAD = 0.5
"""Standard deviation of each channel that a projection hands to the backbone, which was trained on -1..1."""


def vae_subfolder(path: str, options: dict[str, Any]) -> str | None:
    """`vae` when `path` is a pipeline, else None."""
    if "subfolder" in options:
        subfolder: str | None = options["subfolder"]
        return subfolder
    if Path(path).is_dir():
        return "vae" if (Path(path) / "vae" / "config.json").is_file() else None
    try:
        AutoencoderKL.load_config(path, subfolder="vae")
    except OSError:
        return None
    return "vae"


def load_saved_config(model_class: type[AutoencoderKL], path: str, subfolder: str | None) -> dict[str, Any]:
    """The `config.json` of a saved model.

    Raises: ValueError when there is none to be had.
    """
    try:
        saved: dict[str, Any] = model_class.load_config(path, subfolder=subfolder)
    except OSError as error:
        raise ValueError(
            f"{path} is neither a folder nor a hub id with a model that can be loaded ({str(error).splitlines()[0]}); "
            "check the name, and log in with `hf auth login` where a licence must be accepted first"
        ) from error
    return saved


def load_strictly(from_pretrained: Callable[..., Any], path: str, **options: Any) -> Any:
    """Call a diffusers `from_pretrained`.

    Raises: ValueError naming each tensor that is missing, left over or misshaped.
    """
    model, info = from_pretrained(path, output_loading_info=True, **options)
    faults = [
        f"{kind.removesuffix('_keys')}: {', '.join(map(str, info[kind]))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if info[kind]
    ]
    if faults:
        raise ValueError(f"{path} does not hold the weights of its config ({'; '.join(faults)}); save it again")
    return model


def load_backbone(model: AutoencoderKLMultispectralAdapter, backbone: AutoencoderKL) -> None:
    """Copy a backbone into a model. First and last convolutions that are to be widened stay for `initialise`."""
    state = dict(backbone.state_dict())
    if model.input_adapter is None:
        state["encoder.conv_in.weight"] = _widened(state["encoder.conv_in.weight"], len(model.bands), dim=1)
    if model.output_adapter is None:
        state["decoder.conv_out.weight"] = _widened(state["decoder.conv_out.weight"], len(model.bands), dim=0)
        state["decoder.conv_out.bias"] = _widened(state["decoder.conv_out.bias"], len(model.bands), dim=0)
    missing, unexpected = model.load_state_dict(state, strict=False)
    adapters = ("input_adapter.", "output_adapter.", "input_attention.", "output_attention.")
    assert not unexpected and all(name.startswith(adapters) for name in missing), (missing, unexpected)


@torch.no_grad()
def initialise(model: AutoencoderKLMultispectralAdapter, how: str, statistics: LeafStatistics | None) -> None:
    """Set both ends of the model to a projection: `random` leaves them, `rgb` or `pca` make them exact.

    Raises: ValueError for an unknown name, or a projection without statistics.
    """
    if how == "random":
        return
    if how not in ("rgb", "pca"):
        raise ValueError(f"adapter_init is {how!r}, expected `random`, `rgb` or `pca`")
    if statistics is None:
        raise ValueError(f"adapter_init `{how}` needs the leaf statistics of a manifest; pass statistics=…")
    project = rgb_projection if how == "rgb" else pca_projection
    inwards, outwards = project(model.bands, statistics)
    if model.input_adapter is not None:
        _set_linear(model.input_adapter.linear, inwards)
    if model.output_adapter is not None:
        _set_linear(model.output_adapter.linear, outwards)


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


def _set_linear(linear: nn.Conv2d, weight: NDArray[np.float64]) -> None:
    linear.weight.copy_(torch.from_numpy(weight)[:, :, None, None])
    assert linear.bias is not None
    linear.bias.zero_()


def _widened(weight: Tensor, num_bands: int, dim: int) -> Tensor:
    """RGB weights repeated over the bands, scaled so that equal bands give what equal RGB gave."""
    repeats = torch.arange(num_bands, device=weight.device) % 3
    scale = 3 / num_bands if dim == 1 else 1.0
    return weight.index_select(dim, repeats) * scale
