"""The multispectral VAE: a diffusers AutoencoderKL between band adapters, whose forward returns leaf-only losses.

B batch, C bands, H, W pixels. Everything outside the model is reflectance; inside, bands are standardised.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from msvae.bands import DEFAULT_NAMES, DEFAULT_WAVELENGTHS_NM, Bands
from msvae.losses.coverage import check_mask, latent_coverage, mask_stats, valid_elements, valid_spectra
from msvae.losses.masked_sum import MaskedSum
from msvae.losses.terms import kl_divergence, spectral_angle, squared_error
from msvae.model.adapters import BandAdapter
from msvae.model.attention import SpectralAttention
from msvae.model.background import standardise, to_reflectance
from msvae.model.initialise import SMALLEST_STD, initialise
from msvae.model.loading import load_backbone, load_saved_config, load_strictly, vae_subfolder
from msvae.shards.manifest import LeafStatistics


class AutoencoderKLMultispectralAdapter(AutoencoderKL):  # type: ignore[misc]
    """A VAE for N spectral bands around a backbone made for three.

    Args beyond those of AutoencoderKL:
        wavelengths_nm, band_names: one entry a band.
        adapter_placement: `both`; or `input` / `output` alone, the other side being the backbone's own first or
            last convolution widened to N bands.
        adapter_width: channels of the adapters' convolutions.
        use_spectral_attention: weigh the bands by their mean spectrum, on both sides.
        use_sam_loss: whether `losses` holds the spectral angle.
        background: `fill` replaces everything off the leaf before encoding, `keep` does not.
        band_mean, band_std: reflectance statistics of training leaves, from the manifest; 0 and 1 when not given.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        wavelengths_nm: Sequence[float] = DEFAULT_WAVELENGTHS_NM,
        band_names: Sequence[str] | None = None,
        adapter_placement: str = "both",
        adapter_width: int = 32,
        use_spectral_attention: bool = True,
        use_sam_loss: bool = True,
        background: str = "fill",
        band_mean: Sequence[float] | None = None,
        band_std: Sequence[float] | None = None,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: Sequence[str] = ("DownEncoderBlock2D",),
        up_block_types: Sequence[str] = ("UpDecoderBlock2D",),
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 0.18215,
        shift_factor: float | None = None,
        latents_mean: Sequence[float] | None = None,
        latents_std: Sequence[float] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
    ) -> None:
        if adapter_placement not in ("both", "input", "output"):
            raise ValueError(f"adapter_placement is {adapter_placement!r}, expected `both`, `input` or `output`")
        num_bands = len(wavelengths_nm)
        adapts_input, adapts_output = adapter_placement != "output", adapter_placement != "input"
        super().__init__(
            in_channels=3 if adapts_input else num_bands,
            out_channels=3 if adapts_output else num_bands,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.bands = Bands(tuple(wavelengths_nm), tuple(band_names)) if band_names else _named(wavelengths_nm)
        self.downscale = 2 ** (len(block_out_channels) - 1)
        self.input_adapter = BandAdapter(num_bands, 3, adapter_width) if adapts_input else None
        self.output_adapter = BandAdapter(3, num_bands, adapter_width) if adapts_output else None
        self.input_attention = SpectralAttention(num_bands) if use_spectral_attention else None
        self.output_attention = SpectralAttention(num_bands) if use_spectral_attention else None
        self.register_buffer("leaf_mean", _per_band(band_mean, 0.0, num_bands), persistent=False)
        self.register_buffer("leaf_std", _per_band(band_std, 1.0, num_bands).clamp(min=SMALLEST_STD), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        adapter_init: str = "random",
        statistics: LeafStatistics | None = None,
        **options: Any,
    ) -> Self:
        """Load a saved model, or put new adapters around a backbone.

        Args:
            pretrained_model_name_or_path: hub id or folder of this class, of an AutoencoderKL, or of a pipeline
                with a `vae` subfolder.
            adapter_init: how new adapters begin: `random`, `rgb` or `pca`; the last two need `statistics`.
            statistics: training leaf statistics of a manifest; they also give `band_mean` and `band_std`. A saved
                model of this class keeps its own.
            options: arguments of this class (`adapter_placement`, …) and of diffusers' `from_pretrained`.
        Raises: ValueError when a tensor is missing, left over or misshaped, or an option contradicts a saved model.
        """
        path = os.fspath(pretrained_model_name_or_path)
        options = {"subfolder": vae_subfolder(path, options), **options}
        adapter_options = {name: options.pop(name) for name in _ADAPTER_OPTIONS if name in options}
        saved = load_saved_config(cls, path, options["subfolder"])
        if saved["_class_name"] == cls.__name__:
            _refuse_contradiction(path, saved, adapter_options)
            options |= {name: adapter_options[name] for name in _CHANGEABLE if name in adapter_options}
            return load_strictly(super().from_pretrained, path, **options)  # type: ignore[no-any-return]
        if statistics is not None:
            adapter_options |= {"band_mean": statistics.mean, "band_std": statistics.std}
        backbone = load_strictly(AutoencoderKL.from_pretrained, path, **options)
        model = cls(**{**backbone.config, **adapter_options})
        if backbone.dtype != model.dtype:
            model = model.to(backbone.dtype)
        load_backbone(model, backbone)
        initialise(model.input_adapter, model.output_adapter, model.bands, adapter_init, statistics)
        return model.eval()  # type: ignore[no-any-return]

    def encode(
        self, x: Tensor, return_dict: bool = True, mask: Tensor | None = None
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Latent distribution of reflectance (B, C, H, W); with a leaf mask (B, 1|C, H, W) the rest is filled."""
        _, channels, height, width = x.shape
        if channels != len(self.bands) or height % self.downscale or width % self.downscale:
            raise ValueError(
                f"got a sample of shape {tuple(x.shape)}, the model expects {self.bands} and sides that are "
                f"multiples of {self.downscale}; choose the bands or pad the picture"
            )
        valid = valid_elements(x, check_mask(mask, x))
        bands = standardise(x, valid, self.leaf_mean, self.leaf_std, self.config.background).to(self.dtype)
        if self.input_attention is not None:
            bands = self.input_attention(bands, valid)
        return super().encode(bands if self.input_adapter is None else self.input_adapter(bands), return_dict)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Reflectance (B, C, H, W) of latents (B, latent channels, h, w)."""
        bands = super().decode(z).sample
        if self.output_adapter is not None:
            bands = self.output_adapter(bands)
        if self.output_attention is not None:
            bands = self.output_attention(bands)
        sample = to_reflectance(bands, self.leaf_mean, self.leaf_std)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        mask: Tensor | None = None,
        sample_posterior: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Reconstruct and judge.

        Args: reflectance (B, C, H, W); leaf mask (B, 1|C, H, W) bool, integer or float (leaf above 0.5), or None;
            `sample_posterior` draws the latent, with one generator or one a sample, instead of taking its mode.
        Returns: reconstruction (B, C, H, W) and the losses of `compute_losses`.
        """
        leaf_mask = check_mask(mask, sample)
        (posterior,) = self.encode(sample, return_dict=False, mask=leaf_mask)
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        (reconstruction,) = self.decode(latents, return_dict=False)
        return reconstruction, self.compute_losses(sample, reconstruction, leaf_mask, posterior)

    def compute_losses(
        self,
        original: Tensor,
        reconstruction: Tensor,
        mask: Tensor | None = None,
        posterior: DiagonalGaussianDistribution | None = None,
    ) -> dict[str, Any]:
        """Losses over finite leaf elements.

        Returns:
            `mse` () and `mse_per_channel` (C,): squared error in units of `band_std` squared;
            `sam` (): mean spectral angle, rad, unless `use_sam_loss` is off;
            `kl` (): nats a latent cell, with a posterior;
            `mask_stats`: `coverage`, `valid_pixels`, `total_pixels`;
            `sums`: the MaskedSum behind each of them, to join micro batches and ranks exactly.
        """
        leaf_mask = check_mask(mask, original)
        valid = valid_elements(original, leaf_mask)
        error = squared_error(reconstruction, original, valid)
        sums = {"mse": MaskedSum(error.total / self.leaf_std.square(), error.count)}
        if self.config.use_sam_loss:
            sums["sam"] = spectral_angle(reconstruction, original, valid_spectra(original, valid))
        if posterior is not None:
            leaf_share = latent_coverage(leaf_mask, self.downscale)
            sums["kl"] = kl_divergence(posterior.mean, posterior.logvar, leaf_share)
        means = {term: masked_sum.overall() for term, masked_sum in sums.items()}
        return {
            **means,
            "mse_per_channel": sums["mse"].mean(),
            "mask_stats": mask_stats(leaf_mask),
            "sums": sums,
        }

    def freeze_backbone(self) -> None:
        """Train the adapters and attention alone; a widened first or last convolution counts as an adapter."""
        self.requires_grad_(False)
        for part in self._new_parts():
            part.requires_grad_(True)

    def get_trainable_params(self) -> list[nn.Parameter]:
        """Parameters that training changes, in a fixed order."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def get_band_importance(self, sample: Tensor | None = None, mask: Tensor | None = None) -> dict[float, float]:
        """Weight that spectral attention gives each band on its way in, {wavelength_nm: weight}, 1 is neutral.

        On the leaves of `sample`, or without one on the mean leaf spectrum of the training split.
        Raises: ValueError when the model has no spectral attention.
        """
        if self.input_attention is None:
            raise ValueError("the model has no spectral attention; build it with use_spectral_attention=True")
        if sample is None:
            weights = self.input_attention.weights_of_spectrum(torch.zeros_like(self.leaf_mean)[None])
        else:
            valid = valid_elements(sample, check_mask(mask, sample))
            standardised = standardise(sample, valid, self.leaf_mean, self.leaf_std, self.config.background)
            weights = self.input_attention.weights(standardised.to(self.dtype), valid)
        return dict(zip(self.bands.wavelengths_nm, weights.float().mean(dim=0).tolist(), strict=True))

    def _new_parts(self) -> list[nn.Module]:
        first = self.encoder.conv_in if self.input_adapter is None else self.input_adapter
        last = self.decoder.conv_out if self.output_adapter is None else self.output_adapter
        attention = (self.input_attention, self.output_attention)
        return [first, last, *(part for part in attention if part is not None)]


_CHANGEABLE = ("use_sam_loss", "background")
_ADAPTER_OPTIONS = (
    *("wavelengths_nm", "band_names", "adapter_placement", "adapter_width", "use_spectral_attention"),
    *("band_mean", "band_std", *_CHANGEABLE),
)


def _named(wavelengths_nm: Sequence[float]) -> Bands:
    if tuple(wavelengths_nm) == DEFAULT_WAVELENGTHS_NM:
        return Bands(DEFAULT_WAVELENGTHS_NM, DEFAULT_NAMES)
    return Bands.of_wavelengths(wavelengths_nm)


def _per_band(values: Sequence[float] | None, default: float, num_bands: int) -> Tensor:
    if values is not None and len(values) != num_bands:
        raise ValueError(f"got statistics of {len(values)} bands for a model of {num_bands}; give one value a band")
    return torch.tensor([default] * num_bands if values is None else list(values), dtype=torch.float32)


def _refuse_contradiction(path: str, saved: dict[str, Any], asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        stored = saved.get(name)
        if name == "band_names" and stored is None:
            stored = list(_named(saved["wavelengths_nm"]).names)
        wanted = list(value) if isinstance(value, tuple) else value
        if name not in _CHANGEABLE and wanted != stored:
            raise ValueError(f"{path} was saved with {name}={stored}, asked for {wanted}; leave {name} out")
