"""Reading models and backbones from folders and the hub, strictly: every tensor in its place or an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor


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


def load_backbone(model: AutoencoderKL, backbone: AutoencoderKL) -> None:
    """Copy a backbone into a model around it. Where the model has no adapter, its convolution for N bands starts from
    the one for RGB.
    """
    state = dict(backbone.state_dict())
    for name, dim in (("encoder.conv_in.weight", 1), ("decoder.conv_out.weight", 0), ("decoder.conv_out.bias", 0)):
        state[name] = _widened(state[name], model.get_parameter(name).shape[dim], dim)
    missing, unexpected = model.load_state_dict(state, strict=False)
    adapters = ("input_adapter.", "output_adapter.", "input_attention.", "output_attention.")
    assert not unexpected and all(name.startswith(adapters) for name in missing), (missing, unexpected)


def _widened(weight: Tensor, num_bands: int, dim: int) -> Tensor:
    """RGB weights repeated over the bands, scaled so that equal bands give what equal RGB gave."""
    repeats = torch.arange(num_bands, device=weight.device) % 3
    scale = 3 / num_bands if dim == 1 else 1.0
    return weight.index_select(dim, repeats) * scale
