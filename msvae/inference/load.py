"""Load a trained model onto a device, and identify it by a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from msvae.distributed.exit_codes import out_of_memory_message
from msvae.distributed.setup import make_cuda_exact
from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter
from msvae.model.pretrained import load_saved_config, vae_subfolder

WITHOUT_EFFECT = (
    "backbone",
    "backbone_licence",
    "shift_factor",
    "scaling_factor",
    "factors_of_leaves",
    "metrics",
    "band_importance",
    "use_sam_loss",
)
"""Entries of a config that change neither latents nor reconstructions."""


def load_model(name: str, device: torch.device) -> AutoencoderKLMultispectralAdapter:
    """Load a model of msvae in float32 from a folder, a pipeline or the hub.

    Raises: ValueError if there is no model, if it is a bare backbone, or if its weights cannot be read.
    """
    saved = load_saved_config(AutoencoderKLMultispectralAdapter, name, {"subfolder": vae_subfolder(name, {})})
    if saved["_class_name"] != AutoencoderKLMultispectralAdapter.__name__:
        raise ValueError(
            f"{name} holds a {saved['_class_name']}, expected a model trained on spectral bands, such as RUN/best; "
            "train one around it with model.pretrained"
        )
    if device.type == "cuda":
        # independent of the precision that a launcher sets for training
        make_cuda_exact()
    return AutoencoderKLMultispectralAdapter.from_pretrained(name).to(device)  # type: ignore[no-any-return]


def choose_device(text: str) -> torch.device:
    """Return the device with this name; `auto` is a GPU if there is one, else the CPU.

    Raises: ValueError if the device does not exist.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"got --device {text}, which is not available ({str(error).splitlines()[0]}); give --device cpu"
        ) from error
    return device


@contextmanager
def explain_out_of_memory(what: str, images: torch.Tensor, option: str) -> Iterator[None]:
    """Turn an out-of-memory error of the block into a ValueError that names the option to reduce.

    Args:
        what: name of the batch, such as `8 tiles`.
        images: the batch of images or latents (B, C, H, W).
        option: name of the option, such as `--batch-size`.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if (message := out_of_memory_message(error)) is None:
            raise
        height, width = images.shape[-2:]
        raise ValueError(
            f"too little memory on {images.device} for {what} of {height} x {width} ({message}); "
            f"give a smaller {option}"
        ) from error


def model_sha256(model: AutoencoderKLMultispectralAdapter) -> str:
    """Return the SHA-256 digest of the weights and of the config entries that affect latents or reconstructions.

    `msvae encode` adds `shift_factor` and `scaling_factor` to the config, so they are not part of the digest.
    """
    config = {
        name: value for name, value in model.config.items() if not name.startswith("_") and name not in WITHOUT_EFFECT
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()
