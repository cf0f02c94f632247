"""Writing models to folders and the hub: safetensors, config and a model card."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusers import ModelMixin

from msvae.bands import Bands
from msvae.model.card import write_card


class SavedWithCard(ModelMixin):  # type: ignore[misc]
    """A diffusers model whose README.md is written with its weights."""

    bands: Bands

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        save_function: Callable[..., None] | None = None,
        safe_serialization: bool = True,
        **options: Any,
    ) -> None:
        """Save as diffusers does (`variant`, `max_shard_size`, `push_to_hub`, …), and a model card.

        Raises: ValueError when asked for pickled weights.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization is False, but weights are saved as safetensors alone; leave it out")
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
        """The one way to the hub of `push_to_hub` and of `save_pretrained`; both have just written their own card."""
        source = f'"{repo_id}"' if subfolder is None else f'"{repo_id}", subfolder="{subfolder}"'
        write_card(working_dir, self.config, self.bands, source)
        return super()._upload_folder(working_dir, repo_id, *args, subfolder=subfolder, **options)


def _remove_weights(folder: Path, variant: str | None) -> None:
    """Clear the way: diffusers would leave an index of shards beside a whole file, and then believe the index."""
    part = f".{variant}" if variant else ""
    for pattern in (
        f"diffusion_pytorch_model{part}.safetensors",
        f"diffusion_pytorch_model{part}-*-of-*.safetensors",
        f"diffusion_pytorch_model.safetensors.index{part}.json",
    ):
        for file in folder.glob(pattern):
            file.unlink()
