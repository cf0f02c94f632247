"""The multispectral VAE: a diffusers AutoencoderKL with band adapters, whose forward returns leaf-only losses.

B batch, C bands, H, W pixels. Inputs and outputs are reflectance. Inside the model, bands are standardised.
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

from msvae.bands import DEFAULT_WAVELENGTHS_NM, Bands, LeafStatistics
from msvae.losses.coverage import check_mask, mask_stats, valid_elements
from msvae.losses.objective import LeafLosses
from msvae.losses.spectra import count_nonfinite
from msvae.losses.terms import MaskedSum
from msvae.model.adapters import BandAdapter, SpectralAttention
from msvae.model.diffusers_patches import ResidualCheckpointingMixin, replace_upsamplers
from msvae.model.pretrained import load_saved_or_adapt
from msvae.model.saving import ModelCardMixin
from msvae.model.standardise import LeafStandardisationMixin


class AutoencoderKLMultispectralAdapter(
    ResidualCheckpointingMixin,
    ModelCardMixin,
    LeafStandardisationMixin,
    AutoencoderKL,  # type: ignore[misc]
):
    """A VAE for C spectral bands around a diffusers AutoencoderKL that was made for three channels.

    The arguments below are additional to those of AutoencoderKL. All are stored in `config.json`.

    Args:
        wavelengths_nm: wavelength of each band in nm; by default blue, green, red, red edge and near infrared.
        band_names: name of each band; None means the default names, or names such as `475nm` for other wavelengths.
        adapter_placement: `both` (default) puts an adapter before the encoder and after the decoder. `input` or
            `output` adds one adapter; on the other side the first or last convolution is widened to C bands.
        adapter_form: `residual` (default) is a linear map plus three convolutions, the last initialised to zero;
            `convolution` is the three convolutions without the linear map.
        adapter_width: channels of the convolutions in the adapters.
        use_spectral_attention: weight the bands by a function of their mean spectrum, before and after the backbone.
        use_sam_loss: compute the spectral angle in the losses; see `choose_losses`.
        background: `fill` (default) replaces all pixels off the leaf by the mean leaf spectrum before encoding;
            `keep` encodes them.
        band_mean, band_std: mean and standard deviation of reflectance over training leaves, one value per band; None
            means 0 and 1.
        band_importance: mean attention weight of each band, as measured by the last validation.
        factors_of_leaves: True if `msvae encode` measured `scaling_factor` and `shift_factor` on leaves; False
            (default) if both are copied from the backbone.
        backbone, backbone_licence: source of the backbone and licence entries of its model card; None for a model that
            was trained from scratch.
        metrics: metrics of the validation split by name, for the model card.

    Raises: ValueError if placement or form is unknown, or if names or statistics do not have one value per band.

    Example::

        model = AutoencoderKLMultispectralAdapter.from_pretrained("runs/leaves/best")
        reconstruction, losses = model(sample=reflectance, mask=leaf_mask)  # (B, C, H, W) and (B, 1, H, W)
        loss = losses["mse"] + losses["sam"]
        coverage = losses["mask_stats"]["coverage"]
    """

    # a saved pipeline stores this module name, and diffusers loads the class from it after `import msvae`
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
        replace_upsamplers(self.decoder)
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
        """Load a saved model, or build new adapters around a backbone.

        Args:
            pretrained_model_name_or_path: hub id or folder of this class, of an AutoencoderKL, or of a pipeline with a
                `vae` subfolder.
            adapter_init: initialisation of new adapters: `random` (default), `rgb` or `pca`. The last two need
                `statistics`.
            statistics: leaf statistics of the training split, from a manifest. New adapters use them, and they become
                `band_mean` and `band_std`. A saved model of this class keeps its own.
            options: arguments of this class, such as `adapter_placement`, and of `from_pretrained` of diffusers, such
                as `torch_dtype`.
        Returns: the model in evaluation mode, in float32 unless `torch_dtype` is given.
        Raises: ValueError if there is no model, if a tensor is missing, unexpected or misshaped, if the weights are
            pickled, or if an option contradicts a saved model.
        """
        path = os.fspath(pretrained_model_name_or_path)
        return load_saved_or_adapt(cls, super().from_pretrained, path, adapter_init, statistics, options)  # type: ignore[no-any-return]

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def encode(
        self, x: Tensor, return_dict: bool = True, mask: Tensor | None = None
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Return the latent distribution of tiles, as AutoencoderKL does.

        Args: reflectance (B, C, H, W), floating point, with sides that are multiples of `downscale`; leaf mask
            (B, 1|C, H, W), bool, integer or float (leaf above 0.5), or None if all pixels are leaf.
        Returns: an output whose `latent_dist` has mean and log variance (B, latent channels, h, w); without
            `return_dict` a tuple of `latent_dist`.
        Raises: ValueError if the shape or type of the tiles or of the mask is wrong.
        """
        return self._encode_checked(x, check_mask(mask, x), return_dict)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Return the reflectance of latents, as AutoencoderKL does.

        Args: latents (B, latent channels, h, w), not shifted and scaled. `generator` is not used.
        Returns: an output whose `sample` is reflectance (B, C, H, W); without `return_dict` a tuple of this tensor.
        """
        bands = super().decode(z).sample
        if self.output_adapter is not None:
            bands = self.output_adapter(bands)
        if self.output_attention is not None:
            bands = self.output_attention(bands)
        sample = self.to_reflectance(bands)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: Tensor,
        mask: Tensor | None = None,
        sample_posterior: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sums_only: bool = False,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Reconstruct tiles and compute their losses on leaf pixels.

        Args:
            sample: reflectance (B, C, H, W), as for `encode`.
            mask: leaf mask (B, 1|C, H, W), bool, integer or float (leaf above 0.5), or None if all pixels are leaf.
            sample_posterior: sample the latents from the posterior; by default they are its mode.
            generator: one random generator for all tiles, or a list of one per tile.
            sums_only: return only `sums`, without means and `mask_stats`, for callers that counted the batch before.
        Returns: reconstructed reflectance (B, C, H, W), and the dictionary of `compute_losses`.
        Raises: ValueError if the shape, type or device of `sample` or `mask` is wrong.
        """
        leaf_mask = check_mask(mask, sample)
        (posterior,) = self._encode_checked(sample, leaf_mask, return_dict=False)
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        (reconstruction,) = self.decode(latents, return_dict=False)
        moments = posterior.mean, posterior.logvar
        sums = self.leaf_losses.sums(reconstruction, sample, leaf_mask, self.leaf_std, moments)
        return reconstruction, {"sums": sums} if sums_only else self._losses(sums, sample, leaf_mask)

    def compute_losses(
        self,
        original: Tensor,
        reconstruction: Tensor,
        mask: Tensor | None = None,
        posterior: DiagonalGaussianDistribution | None = None,
    ) -> dict[str, Any]:
        """Return the losses over leaf elements with a finite original.

        Args: original and reconstruction (B, C, H, W), reflectance; leaf mask as for `forward`; posterior of `encode`.
        Returns: a dictionary of

            - the mean of each chosen term, (): `mse` in units of `band_std` squared, `sam` in radians, `kl` (only with
              a posterior) in nats per latent cell, and further terms of `choose_losses`;
            - `mse_per_channel`, (C,), if `mse` is chosen;
            - `mask_stats`: `coverage`, `valid_pixels`, `total_pixels`, the distribution over tiles (`tile_stats`), and
              `nonfinite_elements`, the number of leaf elements that are left out because they are not finite;
            - `sums`: the MaskedSum of each term, to combine micro batches and ranks exactly.
        Raises: ValueError if the shapes differ, or if the mask is wrong.
        """
        if reconstruction.shape != original.shape:
            raise ValueError(
                f"got a reconstruction of shape {tuple(reconstruction.shape)} for an original of "
                f"{tuple(original.shape)}; compare tiles of one shape"
            )
        leaf_mask = check_mask(mask, original)
        moments = None if posterior is None else (posterior.mean, posterior.logvar)
        sums = self.leaf_losses.sums(reconstruction, original, leaf_mask, self.leaf_std, moments)
        return self._losses(sums, original, leaf_mask)

    def choose_losses(self, terms: Sequence[str]) -> None:
        """Compute only these terms, by their names in `msvae.losses.objective.TERMS`.

        Raises: ValueError if a term is unknown, or if `index` is chosen and the bands allow no vegetation index.
        """
        self.leaf_losses = LeafLosses(terms, self.bands, self.downscale)

    def freeze_backbone(self) -> None:
        """Make only adapters and attention trainable; a widened first or last convolution counts as an adapter.

        With placement `output` nothing before the latents is trainable, so the encoder runs without an autograd graph.
        """
        self.requires_grad_(False)
        for part in self._after_latents() if self.input_adapter is None else self._new_parts():
            part.requires_grad_(True)

    def get_trainable_params(self) -> list[nn.Parameter]:
        """Return the trainable parameters in a fixed order."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def get_trainable_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the trainable parameters of adapters and attention, and the trainable parameters of the backbone."""
        new = {parameter for part in self._new_parts() for parameter in part.parameters()}
        trained = self.get_trainable_params()
        return [p for p in trained if p in new], [p for p in trained if p not in new]

    @torch.no_grad()
    def get_band_importance(self, sample: Tensor | None = None, mask: Tensor | None = None) -> dict[float, float]:
        """Return the mean weight of each band in the spectral attention before the encoder.

        Args: reflectance (B, C, H, W) and its leaf mask, as for `forward`. Without a sample, the weights of the last
            validation are returned. If there was no validation, the weights for the mean leaf spectrum of the training
            split are returned.
        Returns: `{wavelength_nm: weight}` with weights from 0 to 2; 1 is neutral.
        Raises: ValueError if the model has no spectral attention.
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
        """Return the attention weights of the bands before the encoder, (C,), summed over tiles that have leaf."""
        assert self.input_attention is not None
        leaf_mask = check_mask(mask, sample)
        valid = valid_elements(sample, leaf_mask)
        weights_BC = self.input_attention.weights(self.standardise(sample, valid).to(self.dtype), valid).float()
        has_leaf_B = leaf_mask.flatten(1).any(dim=1)
        return MaskedSum((weights_BC * has_leaf_B[:, None]).sum(dim=0), has_leaf_B.sum())

    def _new_parts(self) -> list[nn.Module]:
        first = self.encoder.conv_in if self.input_adapter is None else self.input_adapter
        before_latents = [first] if self.input_attention is None else [first, self.input_attention]
        return [*before_latents, *self._after_latents()]

    def _after_latents(self) -> list[nn.Module]:
        last = self.decoder.conv_out if self.output_adapter is None else self.output_adapter
        return [last] if self.output_attention is None else [last, self.output_attention]

    def _encode_checked(self, x: Tensor, leaf_mask: Tensor, return_dict: bool) -> Any:
        _, channels, height, width = x.shape
        if channels != len(self.bands) or height % self.downscale or width % self.downscale:
            raise ValueError(
                f"got a sample of shape {tuple(x.shape)}, the model expects {self.bands} and sides that are "
                f"multiples of {self.downscale}; choose the bands or pad the image"
            )
        if not x.is_floating_point():
            raise ValueError(
                f"got a sample of {x.dtype}, expected reflectance; convert it to float and multiply it by its scale"
            )
        valid = valid_elements(x, leaf_mask)
        bands = self.standardise(x, valid).to(self.dtype)
        if self.input_attention is not None:
            bands = self.input_attention(bands, valid)
        return super().encode(bands if self.input_adapter is None else self.input_adapter(bands), return_dict)

    def _losses(self, sums: dict[str, MaskedSum], original: Tensor, leaf_mask: Tensor) -> dict[str, Any]:
        losses: dict[str, Any] = {term: masked_sum.overall() for term, masked_sum in sums.items()}
        if "mse" in sums:
            losses["mse_per_channel"] = sums["mse"].mean()
        nonfinite, _ = count_nonfinite(original, leaf_mask)
        return losses | {"mask_stats": {**mask_stats(leaf_mask), "nonfinite_elements": nonfinite}, "sums": sums}
