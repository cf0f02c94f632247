"""Save models to folders and the hub: safetensors, config and a model card."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from huggingface_hub import ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined

from msvae.bands import Bands

METRICS = {
    "psnr_db": "PSNR (dB), more is better",
    "angle_deg": "spectral angle (degrees), less is better",
    "ndvi_mae": "mean NDVI error, less is better",
    "ndre_mae": "mean NDRE error, less is better",
    "ssim": "SSIM, more is better",
}
"""Metrics of the validation split that training stores in the config of a model, with their labels in the card."""
TAGS = ["msvae", "multispectral", "autoencoder", "vae", "leaf"]
GENERATED = ("<!-- Written by msvae", "This model card has been automatically generated")
"""Marks of a card that may be overwritten: a card of msvae, or the empty card of diffusers."""


class ModelCardMixin(ModelMixin):  # type: ignore[misc]
    """A diffusers model that saves a model card, README.md, with its weights."""

    bands: Bands

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., None] | None = None,
        safe_serialization: bool = True,
        **options: Any,
    ) -> None:
        """Save weights, config and a model card.

        Args: those of `save_pretrained` of diffusers, such as `variant`, `max_shard_size` or `push_to_hub`.
        Raises: ValueError if `safe_serialization` is False, because pickled weights are never written.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization is False, but weights are saved only as safetensors; leave the argument out"
            )
        if is_main_process:
            _remove_weights(Path(save_directory), options.get("variant"))
        super().save_pretrained(os.fspath(save_directory), is_main_process, save_function, **options)
        if is_main_process:
            write_card(save_directory, self.config, self.bands)

    def _upload_folder(
        self,
        working_dir: str | os.PathLike[str],
        repo_id: str,
        *args: Any,
        subfolder: str | None = None,
        **options: Any,
    ) -> Any:
        """Upload a folder with a card that names the repository.

        `push_to_hub` and `save_pretrained` both call this after they wrote the empty card of diffusers.
        """
        source = f'"{repo_id}"' if subfolder is None else f'"{repo_id}", subfolder="{subfolder}"'
        write_card(working_dir, self.config, self.bands, source)
        return super()._upload_folder(working_dir, repo_id, *args, subfolder=subfolder, **options)


def write_card(folder: str | os.PathLike[str], config: Mapping[str, Any], bands: Bands, source: str = '"."') -> None:
    """Write README.md into the folder of a saved model, unless a person wrote the README.md that is there.

    Args: folder; config and bands of the model; arguments of `from_pretrained` in the example of the card, as code.
    """
    path = Path(folder) / "README.md"
    if not path.exists() or any(mark in path.read_text(encoding="utf-8") for mark in GENERATED):
        path.write_text(_render_card(config, bands, source), encoding="utf-8")


def _remove_weights(folder: Path, variant: str | None) -> None:
    """Remove old weights. Otherwise diffusers could leave an old index next to a new file, and load the old index."""
    part = f".{variant}" if variant else ""
    for pattern in (
        f"diffusion_pytorch_model{part}.safetensors",
        f"diffusion_pytorch_model{part}-*-of-*.safetensors",
        f"diffusion_pytorch_model.safetensors.index{part}.json",
    ):
        for file in folder.glob(pattern):
            file.unlink()


def _render_card(config: Mapping[str, Any], bands: Bands, source: str) -> str:
    licence = config["backbone_licence"] or {}
    head = ModelCardData(
        library_name="diffusers",
        tags=TAGS,
        base_model=_hub_id(config),
        license=licence.get("license"),
        license_name=licence.get("license_name"),
        license_link=_licence_link(config),
    )
    environment = Environment(
        loader=PackageLoader("msvae.model", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("card.md.j2").render(
        head=head.to_yaml(),
        bands=[
            (name.replace("|", "\\|"), f"{nm:g}") for name, nm in zip(bands.names, bands.wavelengths_nm, strict=True)
        ],
        shortest=f"{min(bands.wavelengths_nm):.0f}",
        longest=f"{max(bands.wavelengths_nm):.0f}",
        metrics=_metric_rows(config["metrics"] or {}),
        backbone=config["backbone"],
        licence=licence.get("license_name") or licence.get("license"),
        downscale=2 ** (len(config["block_out_channels"]) - 1),
        config=config,
        source=source,
    )


def _metric_rows(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return label and value of each metric, in the order of `METRICS`: a saved config does not keep its order."""
    names = [name for name in METRICS if name in metrics] + sorted(metrics.keys() - METRICS)
    return [(METRICS.get(name, name), f"{metrics[name]:.4g}") for name in names]


def _hub_id(config: Mapping[str, Any]) -> str | None:
    """Return the hub id of the backbone, or None if the backbone is a folder: a name without a slash."""
    backbone: str | None = config["backbone"]
    return backbone if backbone and "/" in backbone else None


def _licence_link(config: Mapping[str, Any]) -> str | None:
    """Return the URL of the licence. A relative link is a file of the backbone, which this model does not contain."""
    link: str | None = (config["backbone_licence"] or {}).get("license_link")
    if link is None or "://" in link:
        return link
    return f"https://huggingface.co/{_hub_id(config)}/blob/main/{link}" if _hub_id(config) else None
