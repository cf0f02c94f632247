"""The model card: what a saved model says of itself, as README.md beside its weights and on the hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
"""Numbers of the validation split that training puts into a model's `metrics`."""
TAGS = ["msvae", "multispectral", "autoencoder", "vae", "leaf"]
GENERATED = ("<!-- Written by msvae", "This model card has been automatically generated")
"""What marks a card that may be written anew: one of ours, or the empty one of diffusers."""


def write_card(folder: str | os.PathLike[str], config: Mapping[str, Any], bands: Bands, source: str = '"."') -> None:
    """Write README.md into a folder, unless somebody wrote one there by hand.

    Args: folder of a saved model; its config and bands; what `from_pretrained` must be given to find it, as code.
    """
    path = Path(folder) / "README.md"
    if not path.exists() or any(mark in path.read_text(encoding="utf-8") for mark in GENERATED):
        path.write_text(_render(config, bands, source), encoding="utf-8")


def _render(config: Mapping[str, Any], bands: Bands, source: str) -> str:
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
        metrics=_rows(config["metrics"] or {}),
        backbone=config["backbone"],
        licence=licence.get("license_name") or licence.get("license"),
        downscale=2 ** (len(config["block_out_channels"]) - 1),
        config=config,
        source=source,
    )


def _rows(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """In the order of `METRICS`, unknown ones last: a config that was saved has lost its own order."""
    names = [name for name in METRICS if name in metrics] + sorted(metrics.keys() - METRICS)
    return [(METRICS.get(name, name), f"{metrics[name]:.4g}") for name in names]


def _hub_id(config: Mapping[str, Any]) -> str | None:
    """The backbone's, if it has one: names of folders hold no slash."""
    backbone: str | None = config["backbone"]
    return backbone if backbone and "/" in backbone else None


def _licence_link(config: Mapping[str, Any]) -> str | None:
    """Where the licence stands; a file of the backbone is not one that this model holds."""
    link: str | None = (config["backbone_licence"] or {}).get("license_link")
    if link is None or "://" in link:
        return link
    return f"https://huggingface.co/{_hub_id(config)}/blob/main/{link}" if _hub_id(config) else None
