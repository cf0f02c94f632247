"""Where a backbone came from: what a model must remember of it to name it and its licence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import hf_hub_download
from huggingface_hub.repocard import metadata_load

LICENCE_ENTRIES = ("license", "license_name", "license_link")


def origin(path: str, subfolder: str | None, hub_options: Mapping[str, Any]) -> dict[str, Any]:
    """What a model must remember of its backbone.

    Returns: `backbone`, its hub id or the name of its folder; `backbone_licence`, the entries of its model card, such
        as `{"license": "mit"}`, or None where no card can be read.
    """
    licences = (licence for card in _cards(path, subfolder, hub_options) if (licence := _licence(card)))
    return {"backbone": name_of(path), "backbone_licence": next(licences, None)}


def name_of(path: str) -> str:
    """A hub id as it is; of a folder its name alone, that of the pipeline where it is a part of one."""
    folder = Path(path)
    return _pipeline_or_self(folder.resolve()).name if folder.is_dir() else path


def _cards(path: str, subfolder: str | None, hub_options: Mapping[str, Any]) -> list[Path]:
    if Path(path).is_dir():
        folder = Path(path).resolve()
        part = folder / (subfolder or "")
        return [place / "README.md" for place in (part, folder, _pipeline_or_self(part))]
    try:
        return [Path(hf_hub_download(path, "README.md", **hub_options))]
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
