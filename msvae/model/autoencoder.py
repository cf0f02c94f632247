"""The multispectral VAE: a diffusers AutoencoderKL between band adapters, whose forward returns leaf-only losses.

B batch, C bands, H, W pixels. Everything outside the model is reflectance; inside, bands are standardised.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from diffusers import AutoencoderKL
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from msvae.bands import DEFAULT_WAVELENGTHS_NM, Bands
from msvae.leaf_statistics import LeafStatistics
from msvae.losses.coverage import check_mask, mask_stats, valid_elements
from msvae.losses.masked_sum import MaskedSum
from msvae.losses.objective import LeafLosses
from msvae.losses.spectra import count_nonfinite
from msvae.model.adapters import BandAdapter
from msvae.model.attention import SpectralAttention
from msvae.model.background import standardise, to_reflectance
from msvae.model.diffusers_patches import RecomputesResiduals
from msvae.model.initialise import put_backbone
from msvae.model.origin import origin
from msvae.model.pretrained import (
    ADAPTER_OPTIONS,
    CHANGEABLE,
    hub_options,
    load_saved_config,
    load_strictly,
    refuse_contradiction,
    vae_subfolder,
)
from msvae.model.saving import SavedWithCard
from msvae.model.standardise import HoldsLeafStatistics
from msvae.model.upsampling import put_upsampling


class AutoencoderKLMultispectralAdapter(
    RecomputesResiduals,
    SavedWithCard,
    HoldsLeafStatistics,
    AutoencoderKL,  # type: ignore[misc]
):
    """A VAE for N spectral bands around a backbone made for three.

    Args beyond those of AutoencoderKL:
        wavelengths_nm, band_names: one entry a band.
        adapter_placement: `both`; or `input` / `output` alone, the other side being the backbone's own first or
            last convolution widened to N bands.
        adapter_form: `residual`, a linear map plus three convolutions that start at zero; `convolution`, those alone.
        adapter_width: channels of the adapters' convolutions.
        use_spectral_attention: weigh the bands by their mean spectrum, on both sides.
        use_sam_loss: whether `losses` holds the spectral angle.
        background: `fill` replaces everything off the leaf before encoding, `keep` does not.
        band_mean, band_std: reflectance statistics of training leaves, from the manifest; 0 and 1 when not given.
        band_importance: mean attention weight of each band, as last measured on the validation split.
        factors_of_leaves: whether `msvae encode` measured scaling_factor and shift_factor; else they are those of the
            backbone.
        backbone, backbone_licence, metrics: for the model card. Where the backbone came from, None when made from
            scratch; the licence entries of its own card; numbers of the validation split by name.
    """

    # a saved pipeline names this module, and diffusers loads from it once `import msvae` has been run
    __module__ = "msvae"

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        wavelengths_nm: Sequence[float] = DEFAULT_WAVELENGTHS_NM,
        band_names: Sequence[str] | None = None,
        adapter_placement: str = "both",
        adapter_form: str = "residual",
        adapter_width: int = 32,
        use_spectral_attention: bool = True,
        use_sam_loss: bool = True,
        background: str = "fill",
        band_mean: Sequence[float] | None = None,
        band_std: Sequence[float] | None = None,
        band_importance: Sequence[float] | None = None,
        factors_of_leaves: bool = False,
        backbone: str | None = None,
        backbone_licence: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
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
        if adapter_form not in ("residual", "convolution"):
            raise ValueError(f"adapter_form is {adapter_form!r}, expected `residual` or `convolution`")
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
        put_upsampling(self.decoder)
        self.bands = Bands.named(wavelengths_nm, band_names)
        self.downscale = 2 ** (len(block_out_channels) - 1)
        self.choose_losses(("mse", "sam", "kl") if use_sam_loss else ("mse", "kl"))
        self.input_adapter = BandAdapter(num_bands, 3, adapter_width, adapter_form) if adapts_input else None
        self.output_adapter = BandAdapter(3, num_bands, adapter_width, adapter_form) if adapts_output else None
        self.input_attention = SpectralAttention(num_bands) if use_spectral_attention else None
        self.output_attention = SpectralAttention(num_bands) if use_spectral_attention else None
        self.register_leaf_statistics()

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
        adapter_options = {name: options.pop(name) for name in ADAPTER_OPTIONS if name in options}
        saved = load_saved_config(cls, path, options)
        if saved["_class_name"] == cls.__name__:
            refuse_contradiction(path, saved, adapter_options)
            options |= {name: adapter_options[name] for name in CHANGEABLE if name in adapter_options}
            return load_strictly(super().from_pretrained, path, **options)  # type: ignore[no-any-return]
        if statistics is not None:
            adapter_options |= {"band_mean": statistics.mean, "band_std": statistics.std}
        backbone = load_strictly(AutoencoderKL.from_pretrained, path, **options)
        adapter_options = origin(path, options["subfolder"], hub_options(options)) | adapter_options
        model = cls(**{**backbone.config, **adapter_options})
        if backbone.dtype != model.dtype:
            model = model.to(backbone.dtype)
        put_backbone(model, backbone, model.bands, adapter_init, statistics)
        return model.eval()  # type: ignore[no-any-return]

    @apply_forward_hook  # type: ignore[untyped-decorator]
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
        if not x.is_floating_point():
            raise ValueError(
                f"got a sample of {x.dtype}, expected reflectance; turn to float and multiply by the scale"
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
            the mean of each term of `choose_losses`, (), such as `mse`, in units of `band_std` squared, `sam`, the
                mean spectral angle in radians, and `kl`, nats a latent cell, with a posterior;
            `mse_per_channel` (C,), with `mse`;
            `mask_stats`: `coverage`, `valid_pixels`, `total_pixels`, the spread over tiles, and `nonfinite_elements`
                of the original, which are left out;
            `sums`: the MaskedSum behind each term, to join micro batches and ranks exactly.
        """
        if reconstruction.shape != original.shape:
            raise ValueError(
                f"got a reconstruction of shape {tuple(reconstruction.shape)} for an original of "
                f"{tuple(original.shape)}; compare tiles of one shape"
            )
        leaf_mask = check_mask(mask, original)
        moments = None if posterior is None else (posterior.mean, posterior.logvar)
        sums = self.leaf_losses.sums(reconstruction, original, leaf_mask, self.leaf_std, moments)
        losses: dict[str, Any] = {term: masked_sum.overall() for term, masked_sum in sums.items()}
        if "mse" in sums:
            losses["mse_per_channel"] = sums["mse"].mean()
        nonfinite, _ = count_nonfinite(original, leaf_mask)
        return losses | {"mask_stats": {**mask_stats(leaf_mask), "nonfinite_elements": nonfinite}, "sums": sums}

    def choose_losses(self, terms: Sequence[str]) -> None:
        """Compute these terms alone; see `msvae.losses.objective.TERMS`.

        Raises: ValueError for an unknown term, or one that the bands do not allow.
        """
        self.leaf_losses = LeafLosses(terms, self.bands, self.downscale)

    def freeze_backbone(self) -> None:
        """Train the adapters and attention alone; a widened last convolution counts as an adapter.

        With placement `output` nothing before the latents is trained, so that the encoder runs without a graph.
        """
        self.requires_grad_(False)
        for part in self._after_latents() if self.input_adapter is None else self._new_parts():
            part.requires_grad_(True)

    def get_trainable_params(self) -> list[nn.Parameter]:
        """Parameters that training changes, in a fixed order."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def get_trainable_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters that training changes: those of adapters and attention, and those of the backbone."""
        new = {parameter for part in self._new_parts() for parameter in part.parameters()}
        trained = self.get_trainable_params()
        return [p for p in trained if p in new], [p for p in trained if p not in new]

    @torch.no_grad()
    def get_band_importance(self, sample: Tensor | None = None, mask: Tensor | None = None) -> dict[float, float]:
        """Mean weight that spectral attention gives each band on its way in, {wavelength_nm: weight}, 1 is neutral.

        On the leaves of `sample`; without one, as last measured on the validation split while training, else for the
        mean leaf spectrum of the training split.
        Raises: ValueError when the model has no spectral attention.
        """
        if self.input_attention is None:
            raise ValueError("the model has no spectral attention; build it with use_spectral_attention=True")
        if sample is not None:
            weights = self.band_weights(sample, mask).mean().tolist()
        elif self.config.band_importance is not None:
            weights = self.config.band_importance
        else:
            mean_leaf = torch.zeros_like(self.leaf_mean, dtype=self.dtype)[None]
            weights = self.input_attention.weights_of_spectrum(mean_leaf)[0].tolist()
        return dict(zip(self.bands.wavelengths_nm, weights, strict=True))

    def band_weights(self, sample: Tensor, mask: Tensor | None = None) -> MaskedSum:
        """Weights that spectral attention gives the bands on their way in, (C,), summed over tiles with leaf."""
        assert self.input_attention is not None
        leaf_mask = check_mask(mask, sample)
        valid = valid_elements(sample, leaf_mask)
        standardised = standardise(sample, valid, self.leaf_mean, self.leaf_std, self.config.background)
        weights_BC = self.input_attention.weights(standardised.to(self.dtype), valid).float()
        has_leaf_B = leaf_mask.flatten(1).any(dim=1)
        return MaskedSum((weights_BC * has_leaf_B[:, None]).sum(dim=0), has_leaf_B.sum())

    def _new_parts(self) -> list[nn.Module]:
        first = self.encoder.conv_in if self.input_adapter is None else self.input_adapter
        before_latents = [first] if self.input_attention is None else [first, self.input_attention]
        return [*before_latents, *self._after_latents()]

    def _after_latents(self) -> list[nn.Module]:
        last = self.decoder.conv_out if self.output_adapter is None else self.output_adapter
        return [last] if self.output_attention is None else [last, self.output_attention]
