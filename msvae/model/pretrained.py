"""Reading models and backbones from folders and the hub, strictly: every tensor in its place or an error."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL
from huggingface_hub import hf_hub_download

from msvae.bands import Bands
from msvae.model.origin import name_of

CHANGEABLE = (
    *("use_sam_loss", "background", "backbone", "backbone_licence"),
    *("metrics", "band_importance", "factors_of_leaves"),
)
"""Options that hold no weights: a saved model may be loaded with others."""
ADAPTER_OPTIONS = (
    *("wavelengths_nm", "band_names", "adapter_placement", "adapter_form", "adapter_width", "use_spectral_attention"),
    *("band_mean", "band_std", *CHANGEABLE),
)
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_CONVERT = (
    "Pickled weights (.bin) are not read, since that may run code; if you trust them, convert them to safetensors "
    "with diffusers' own AutoencoderKL.from_pretrained(…).save_pretrained(…)"
)


def hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options of `from_pretrained` that say which files of the hub are meant."""
    return {name: options[name] for name in _HUB_OPTIONS if name in options}


def vae_subfolder(path: str, options: Mapping[str, Any]) -> str | None:
    """`vae` when `path` is a pipeline, else None."""
    if "subfolder" in options:
        subfolder: str | None = options["subfolder"]
        return subfolder
    if Path(path).is_dir():
        return "vae" if (Path(path) / "vae" / "config.json").is_file() else None
    try:
        AutoencoderKL.load_config(path, subfolder="vae", **hub_options(options))
    except OSError:
        return None
    return "vae"


def load_saved_config(model_class: type[AutoencoderKL], path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The `config.json` of a saved model.

    Raises: ValueError when there is none to be had.
    """
    try:
        saved: dict[str, Any] = model_class.load_config(path, subfolder=options["subfolder"], **hub_options(options))
    except OSError as error:
        raise ValueError(
            f"{path} is neither a folder nor a hub id with a model that can be loaded ({str(error).splitlines()[0]}); "
            "check the name, and log in with `hf auth login` where a licence must be accepted first"
        ) from error
    return saved


def refuse_contradiction(path: str, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Compare the options of a call with the config of a saved model.

    Raises: ValueError when one of them would need other weights.
    """
    for name, value in asked.items():
        stored = saved.get(name)
        if name == "band_names" and stored is None:
            stored = list(Bands.named(saved["wavelengths_nm"]).names)
        wanted = list(value) if isinstance(value, tuple) else value
        if name not in CHANGEABLE and wanted != stored:
            raise ValueError(f"{path} was saved with {name}={stored}, asked for {wanted}; leave {name} out")


def load_strictly(from_pretrained: Callable[..., Any], path: str, **options: Any) -> Any:
    """Call a diffusers `from_pretrained`, on safetensors alone.

    Raises: ValueError naming each tensor that is missing, left over or misshaped, or the file that cannot be read.
    """
    _refuse_pickle(path, options)
    try:
        model, info = from_pretrained(path, output_loading_info=True, **{**options, "use_safetensors": True})
    except OSError as error:
        raise ValueError(
            f"{path} has no weights that can be read ({str(error).splitlines()[0].rstrip('.')}); "
            f"expected whole safetensors files, so copy again what is missing or damaged. {_CONVERT}"
        ) from error
    except (RuntimeError, ValueError) as error:
        fault = " ".join(str(error).split()).split(". ")[0]
        if not any(words in fault for words in ("expected shape", "size mismatch")):
            raise
        raise ValueError(f"{path} does not hold the weights of its config ({fault}); save it again") from error
    faults = [
        f"{kind.removesuffix('_keys')}: {', '.join(map(str, info[kind]))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if info[kind]
    ]
    if faults:
        raise ValueError(f"{path} does not hold the weights of its config ({'; '.join(faults)}); save it again")
    # diffusers has put the path there, which is no one else's business once the model is shared
    model.register_to_config(_name_or_path=name_of(path))
    return model


def _refuse_pickle(path: str, options: Mapping[str, Any]) -> None:
    if options.get("use_safetensors") is False:
        raise ValueError(f"use_safetensors is False. {_CONVERT}")
    # an index may name any file, and diffusers unpickles those that do not end in .safetensors
    for index in _shard_indices(path, options):
        for file in json.loads(index.read_text())["weight_map"].values():
            if not file.endswith(".safetensors"):
                raise ValueError(f"{index} names {file}. {_CONVERT}")


def _shard_indices(path: str, options: Mapping[str, Any]) -> list[Path]:
    subfolder = options.get("subfolder")
    if Path(path).is_dir():
        return sorted((Path(path) / (subfolder or "")).glob("*.safetensors.index*.json"))
    variant = f".{options['variant']}" if options.get("variant") else ""
    name = f"diffusion_pytorch_model.safetensors.index{variant}.json"
    try:
        return [Path(hf_hub_download(path, name, subfolder=subfolder, **hub_options(options)))]
    except OSError:
        return []
