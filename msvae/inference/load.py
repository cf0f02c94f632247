"""A trained model on the device that will use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from msvae.distributed.exit_codes import out_of_memory_message
from msvae.distributed.setup import make_cuda_exact
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.model.pretrained import load_saved_config, vae_subfolder


def load_model(name: str, device: torch.device) -> AutoencoderKLMultispectralAdapter:
    """A model of ours from a folder, a pipeline or the hub, in float32.

    Raises: ValueError when there is none, it is a bare backbone, or its weights cannot be read.
    """
    saved = load_saved_config(AutoencoderKLMultispectralAdapter, name, {"subfolder": vae_subfolder(name, {})})
    if saved["_class_name"] != AutoencoderKLMultispectralAdapter.__name__:
        raise ValueError(
            f"{name} holds a {saved['_class_name']}, expected a model trained on spectral bands, such as RUN/best; "
            "train one around it with model.pretrained"
        )
    if device.type == "cuda":
        # whatever precision a launcher asks for training
        make_cuda_exact()
    return AutoencoderKLMultispectralAdapter.from_pretrained(name).to(device)  # type: ignore[no-any-return]


def choose_device(text: str) -> torch.device:
    """The device of that name; `auto` is a GPU where there is one.

    Raises: ValueError for one that is not there.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"got --device {text}, which is not there ({str(error).splitlines()[0]}); give cpu"
        ) from error
    return device


@contextmanager
def fitting_into_memory(what: str, images: torch.Tensor, option: str) -> Iterator[None]:
    """Put images or latents (B, C, H, W) through a model. Raises: ValueError when that takes too much memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (told := out_of_memory_message(error)) is None:
            raise
        height, width = images.shape[-2:]
        raise ValueError(
            f"too little memory on {images.device} for {what} of {height} x {width} ({told}); give a smaller {option}"
        ) from error
