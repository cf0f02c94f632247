"""Multispectral leaf autoencoders: leaf-only losses, exact streaming, exact distributed training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter

__all__ = ["AutoencoderKLMultispectralAdapter"]


def __getattr__(name: str) -> Any:
    if name == "AutoencoderKLMultispectralAdapter":
        # imported on first use: torch takes seconds, and `msvae pack` does not need it
        from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter

        return AutoencoderKLMultispectralAdapter
    raise AttributeError(f"module 'msvae' has no attribute {name!r}")
