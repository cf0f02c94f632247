"""Load saved models and backbones from folders and the hub. Missing and unexpected tensors are errors.

A new model stores the source and the licence of its backbone in its config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from diffusers import AutoencoderKL
from huggingface_hub import hf_hub_download
from huggingface_hub.repocard import metadata_load

from msvae.bands import Bands, LeafStatistics
from msvae.model.initialise import initialise_from_backbone

CHANGEABLE = (
    *("use_sam_loss", "background", "backbone", "backbone_licence"),
    *("metrics", "band_importance", "factors_of_leaves"),
)
"""Options that do not change weights: a saved model may be loaded with other values."""
ADAPTER_OPTIONS = (
    *("wavelengths_nm", "band_names", "adapter_placement", "adapter_form", "adapter_width", "use_spectral_attention"),
    *("band_mean", "band_std", *CHANGEABLE),
)
LICENCE_ENTRIES = ("license", "license_name", "license_link")
_HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_CONVERT = (
    "Pickled weights (.bin) are not read, because that can run code; if you trust them, convert them to safetensors "
    "with diffusers' own AutoencoderKL.from_pretrained(…).save_pretrained(…)"
)


def load_saved_or_adapt(
    model_class: type[AutoencoderKL],
    load_saved: Callable[..., Any],
    path: str,
    adapter_init: str,
    statistics: LeafStatistics | None,
    options: Mapping[str, Any],
) -> Any:
    """Load a saved model of `model_class`, or build one around a backbone.

    Args: class of the model; function that loads a saved model of this class. The other arguments are those of
        `AutoencoderKLMultispectralAdapter.from_pretrained`.
    Raises: ValueError if the model cannot be loaded, or if an option contradicts it.
    """
    options = {"subfolder": vae_subfolder(path, options), **options}
    adapter_options = {name: options.pop(name) for name in ADAPTER_OPTIONS if name in options}
    saved = load_saved_config(model_class, path, options)
    if saved["_class_name"] == model_class.__name__:
        _check_unchanged(path, saved, adapter_options)
        options |= {name: adapter_options[name] for name in CHANGEABLE if name in adapter_options}
        return _load_strictly(load_saved, path, **options)
    if statistics is not None:
        adapter_options |= {"band_mean": statistics.mean, "band_std": statistics.std}
    backbone = _load_strictly(AutoencoderKL.from_pretrained, path, **options)
    adapter_options = _backbone_origin(path, options["subfolder"], options) | adapter_options
    model = model_class(**{**backbone.config, **adapter_options})
    if backbone.dtype != model.dtype:
        model = model.to(backbone.dtype)
    initialise_from_backbone(model, backbone, adapter_init, statistics)
    return model.eval()


def vae_subfolder(path: str, options: Mapping[str, Any]) -> str | None:
    """Return the `subfolder` of the options, else `vae` if `path` is a pipeline, else None."""
    if "subfolder" in options:
        subfolder: str | None = options["subfolder"]
        return subfolder
    if Path(path).is_dir():
        return "vae" if (Path(path) / "vae" / "config.json").is_file() else None
    try:
        AutoencoderKL.load_config(path, subfolder="vae", **_hub_options(options))
    except OSError:
        return None
    return "vae"


def load_saved_config(model_class: type[AutoencoderKL], path: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `config.json` of a saved model.

    Raises: ValueError if there is no such file.
    """
    try:
        saved: dict[str, Any] = model_class.load_config(path, subfolder=options["subfolder"], **_hub_options(options))
    except OSError as error:
        raise ValueError(
            f"{path} is neither a folder nor a hub id with a model that can be loaded ({str(error).splitlines()[0]}); "
            "check the name, and log in with `hf auth login` if a licence must be accepted first"
        ) from error
    return saved


def _hub_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of `from_pretrained` that select files on the hub."""
    return {name: options[name] for name in _HUB_OPTIONS if name in options}


def _check_unchanged(path: str, saved: Mapping[str, Any], requested: Mapping[str, Any]) -> None:
    """Check that the options of a call equal the config of a saved model.

    Raises: ValueError if an option would need other weights.
    """
    for name, value in requested.items():
        stored = saved.get(name)
        if name == "band_names" and stored is None:
            stored = list(Bands.named(saved["wavelengths_nm"]).names)
        wanted = list(value) if isinstance(value, tuple) else value
        if name not in CHANGEABLE and wanted != stored:
            raise ValueError(f"{path} was saved with {name}={stored}, got {wanted}; leave {name} out")


def _load_strictly(from_pretrained: Callable[..., Any], path: str, **options: Any) -> Any:
    """Call a diffusers `from_pretrained` with safetensors only.

    Raises: ValueError that names the unreadable file, or the tensors that are missing, unexpected or misshaped.
    """
    _refuse_pickle(path, options)
    try:
        model, info = from_pretrained(path, output_loading_info=True, **{**options, "use_safetensors": True})
    except OSError as error:
        raise ValueError(
            f"{path} has no weights that can be read ({str(error).splitlines()[0].rstrip('.')}); "
            f"expected complete safetensors files, so copy missing or damaged files again. {_CONVERT}"
        ) from error
    except (RuntimeError, ValueError) as error:
        fault = " ".join(str(error).split()).split(". ")[0]
        if not any(words in fault for words in ("expected shape", "size mismatch")):
            raise
        raise ValueError(f"the weights in {path} do not match its config ({fault}); save it again") from error
    faults = [
        f"{kind.removesuffix('_keys')}: {', '.join(map(str, info[kind]))}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if info[kind]
    ]
    if faults:
        raise ValueError(f"the weights in {path} do not match its config ({'; '.join(faults)}); save it again")
    # diffusers stores the local path here, which must not be shared with the model
    model.register_to_config(_name_or_path=_public_name(path))
    return model


def _refuse_pickle(path: str, options: Mapping[str, Any]) -> None:
    if options.get("use_safetensors") is False:
        raise ValueError(f"use_safetensors is False. {_CONVERT}")
    # an index may name any file, and diffusers unpickles files that do not end in .safetensors
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
        return [Path(hf_hub_download(path, name, subfolder=subfolder, **_hub_options(options)))]
    except OSError:
        return []


def _backbone_origin(path: str, subfolder: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config entries that name a backbone and its licence.

    Returns: `backbone`, the hub id or the name of the folder; `backbone_licence`, the licence entries of its model
        card, such as `{"license": "mit"}`, or None if no card states a licence.
    """
    licences = (licence for card in _model_cards(path, subfolder, options) if (licence := _licence(card)))
    return {"backbone": _public_name(path), "backbone_licence": next(licences, None)}


def _public_name(path: str) -> str:
    """Return a hub id unchanged, or the name of a folder; a part of a pipeline has the name of the pipeline."""
    folder = Path(path)
    return _pipeline_or_self(folder.resolve()).name if folder.is_dir() else path


def _model_cards(path: str, subfolder: str | None, options: Mapping[str, Any]) -> list[Path]:
    if Path(path).is_dir():
        folder = Path(path).resolve()
        part = folder / (subfolder or "")
        return [parent / "README.md" for parent in (part, folder, _pipeline_or_self(part))]
    try:
        return [Path(hf_hub_download(path, "README.md", **_hub_options(options)))]
    except (OSError, ValueError):
        return []


def _licence(card: Path) -> dict[str, str]:
    try:
        entries = metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {name: str(entries[name]) for name in LICENCE_ENTRIES if entries.get(name)}


def _pipeline_or_self(folder: Path) -> Path:
    return folder.parent if (folder.parent / "model_index.json").is_file() else folder
