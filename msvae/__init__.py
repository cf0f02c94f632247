"""Multispectral leaf autoencoders: leaf-only losses, exact streaming, exact distributed training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter

__all__ = ["AutoencoderKLMultispectralAdapter", "ModelMixin"]


def __getattr__(name: str) -> Any:
    # imported on first use: the import of torch takes seconds, and `msvae pack` does not need it
    if name == "AutoencoderKLMultispectralAdapter":
        from msvae.model.autoencoder import AutoencoderKLMultispectralAdapter

        return AutoencoderKLMultispectralAdapter
    if name == "ModelMixin":
        # diffusers loads a component of a pipeline from a library only if the library exports this base class
        from diffusers import ModelMixin

        return ModelMixin
    raise AttributeError(f"module 'msvae' has no attribute {name!r}")
