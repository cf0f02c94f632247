"""Configuration of a run: typed YAML with dotted overrides. An unknown key is an error.

`--config FILE` is read first. `--section.key value` then replaces single values. Environment variables have no effect.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from msvae.credentials import check_no_credentials


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """Backbone, band adapters, and the part of the model that is trained."""

    pretrained: str = "stabilityai/stable-diffusion-3-medium-diffusers"
    """Hub id or folder of an AutoencoderKL, or of a pipeline with one; `tiny` is a small, untrained backbone."""
    adapter_placement: Literal["both", "input", "output"] = "both"
    """`both`: band adapters before the encoder and after the decoder. `input` or `output`: one adapter; on the other
    side the backbone's own convolution is widened to all bands."""
    adapter_init: Literal["random", "rgb", "pca"] = "pca"
    """Initial adapters. `pca`: the first three principal components of leaf spectra. `rgb`: the red, green and blue
    bands, other bands by least squares. `random`: random weights."""
    adapter_form: Literal["residual", "convolution"] = "residual"
    """`residual`: a linear map plus three convolutions that start at zero. `convolution`: three convolutions alone;
    needs `adapter_init: random`."""
    adapter_width: PositiveInt = 32
    """Channels of the hidden layers of each adapter."""
    use_spectral_attention: bool = True
    """Multiply each band by a learned weight in 0..2 that depends on the mean leaf spectrum, on input and output."""
    train_backbone: Literal["none", "decoder", "all"] = "none"
    """Trained part of the backbone, in addition to the adapters. `tiny` needs `all`. With placement `output` and
    without `all`, no weight before the latents is trained."""
    sample_posterior: bool = True
    """Sample the latents from the posterior during training; false uses its mode, as evaluation always does."""


class DataConfig(_Section):
    """Shards, batches, augmentation, and checks of the data."""

    train: str = "shards/train"
    """Folder or URL (s3://, gs://, az://, https://) of the training split, as written by `msvae pack`."""
    val: str | None = "shards/val"
    """Folder or URL of the validation split; null trains without validation."""
    cache: Path | None = None
    """Folder on a local disk for data read from a URL, shared by all ranks of a machine; null caches nothing."""
    cache_gb: PositiveFloat = 100.0
    """Largest size of the cache, in GB; the oldest shards are removed first."""
    max_bad_samples: NonNegativeInt = 0
    """Number of unreadable samples (replaced, and listed in `bad-samples/`) above which training stops."""
    global_batch_size: PositiveInt = 32
    """Tiles per optimizer step over all ranks: a multiple of ranks x `micro_batch_size`. Gradients are accumulated to
    this size, so the result does not depend on the number of ranks."""
    micro_batch_size: PositiveInt = 8
    """Tiles per forward pass of a rank. Lower it if memory is short; the result does not change."""
    num_workers: NonNegativeInt = 2
    """Reader threads per rank; 0 reads between the steps."""
    flips: bool = False
    """Mirror each training tile left to right with probability 1/2."""
    quarter_turns: bool = False
    """Rotate each training tile by 0, 90, 180 or 270 degrees, with equal probability."""
    crop_px: PositiveInt | None = None
    """Side of the random square crop of each training tile, in pixels; null trains on whole tiles."""
    background: Literal["fill", "keep"] = "fill"
    """`fill` replaces pixels outside the leaf mask before the encoder; `keep` passes them to the encoder."""
    low_coverage: float = Field(0.1, ge=0, le=1)
    """Warn if the leaf share of a global batch is below this value (0..1); the warning names its emptiest tiles."""
    high_coverage: float = Field(0.95, ge=0, le=1)
    """Warn if the leaf share of a global batch is above this value (0..1); the warning names its fullest tiles."""
    max_nonfinite_share: float = Field(0.001, ge=0, le=1)
    """Largest share (0..1) of leaf values that are NaN or infinite. They never enter the loss; training stops above
    this share."""
    check_every: PositiveInt = 100
    """Steps between checks of leaf coverage, unreadable samples and non-finite values. Each check warns at most once
    per kind."""
    trace: bool = False
    """Write the samples of every step to `trace/rank-00000.jsonl`, one file per rank."""

    @model_validator(mode="after")
    def _check_coverage_limits(self) -> DataConfig:
        if self.low_coverage >= self.high_coverage:
            raise ValueError(
                f"low_coverage is {self.low_coverage:g} and high_coverage {self.high_coverage:g}; "
                "expected low_coverage below high_coverage"
            )
        return self


TERMS_WITHOUT_TARGET = {"range", "kl"}
"""Loss terms that do not compare the reconstruction with the original."""


class LossConfig(_Section):
    """Weights of the loss terms, which are means over leaf pixels only. A term with weight 0 is not computed."""

    mse_weight: NonNegativeFloat = 1.0
    """Weight of the squared error, in units of each band's variance over training leaves."""
    l1_weight: NonNegativeFloat = 0.0
    """Weight of the absolute error, in units of each band's standard deviation over training leaves."""
    huber_weight: NonNegativeFloat = 0.0
    """Weight of the Huber error: half the squared error up to one standard deviation of the band, linear above."""
    sam_weight: NonNegativeFloat = 1.0
    """Weight of the spectral angle between original and reconstruction, in radians; it ignores brightness."""
    cosine_weight: NonNegativeFloat = 0.0
    """Weight of 1 - cos of the spectral angle; for small angles, its gradient is smaller than that of the angle."""
    signature_weight: NonNegativeFloat = 0.0
    """Weight of the squared error of each tile's mean leaf spectrum, in units of each band's variance."""
    range_weight: NonNegativeFloat = 0.0
    """Weight of the squared distance of reconstructed reflectance from 0..1, in units of each band's variance."""
    index_weight: NonNegativeFloat = 0.0
    """Weight of the absolute error of NDVI and NDRE, averaged over those whose bands exist."""
    kl_weight: NonNegativeFloat = 1e-6
    """Weight of the KL divergence of the posterior from N(0, 1), in nats per latent cell. Not part of the validation
    loss."""

    @property
    def weights(self) -> dict[str, float]:
        """Weights of all terms that are not 0, by name."""
        return {name.removesuffix("_weight"): weight for name, weight in self if weight}

    @model_validator(mode="after")
    def _check_any_target_term(self) -> LossConfig:
        if not self.weights.keys() - TERMS_WITHOUT_TARGET:
            raise ValueError(
                "mse_weight, sam_weight and all other weights of terms that compare with the original are 0 "
                "(range and kl do not compare), so nothing would be trained; set one above 0"
            )
        return self


class OptimConfig(_Section):
    """AdamW, the schedule of its learning rate, and the moving average of the weights."""

    lr: NonNegativeFloat = 1e-4
    """Peak learning rate of adapters and spectral attention."""
    backbone_lr: NonNegativeFloat | None = None
    """Peak learning rate of the trained part of the backbone; null uses `lr`."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay of AdamW."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay rates of AdamW's first and second moments."""
    warmup_steps: NonNegativeInt = 100
    """Steps of linear warm-up of the learning rate from 0 to its peak."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning rate after warm-up; `cosine` and `linear` fall to 0 at `train.max_steps`."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Largest norm of the gradient over all trained weights; larger gradients are scaled down. 0 disables clipping."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Decay of the moving average of the weights. The average is evaluated and saved; 0 disables it."""


class TrainConfig(_Section):
    """Length of the run, logging, evaluation, checkpoints, and limits."""

    max_steps: PositiveInt = 10_000
    """Number of optimizer steps, including those before a resume."""
    seed: NonNegativeInt = 0
    """Seed of initial weights, of the order of samples, of augmentation and of the noise of each sample."""
    log_every: PositiveInt = 1
    """Steps between rows of `metrics.jsonl` and TensorBoard. Each row waits for the device once."""
    eval_every: NonNegativeInt = 500
    """Steps between evaluations on the validation split; 0 evaluates only before the first and after the last step."""
    checkpoint_every: NonNegativeInt = 500
    """Steps between checkpoints; 0 writes only the last."""
    keep_checkpoints: PositiveInt = 3
    """Number of newest checkpoints that are kept."""
    resume: str = "auto"
    """`auto` resumes from the newest checkpoint in `out`; `never` requires an `out` without a run; any other
    value is the path of a checkpoint."""
    patience: NonNegativeInt = 0
    """Stop after this many successive evaluations without a lower validation loss; 0 never stops early."""
    max_nonfinite_steps: PositiveInt = 10
    """Successive steps with a NaN or infinite gradient after which training stops; such steps do not change the
    weights."""
    timeout_s: PositiveFloat = 1800.0
    """Time that a rank waits for the other ranks before the run ends, in seconds."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Store images with bands as the innermost dimension (torch.channels_last)."""
    gradient_checkpointing: bool = False
    """Recompute the backbone's activations in the backward pass instead of storing them: less memory, more time."""


class Config(BaseSettings):
    """Complete configuration of a run."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        cli_avoid_json=True,
        cli_parse_none_str="null",
        cli_prog_name="train.py --config FILE",
        cli_exit_on_error=False,
        nested_model_default_partial_update=True,
    )

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    out: str = "runs/msvae"
    """Folder or URL (s3://, gs://, az://) that the run writes; an earlier run there is resumed (`train.resume`)."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read values from YAML only, not from the environment. pydantic-settings itself applies the overrides."""
        return (init_settings,)

    @model_validator(mode="after")
    def _check_backbone_lr(self) -> Config:
        if self.optim.backbone_lr is not None and self.model.train_backbone == "none":
            raise ValueError(
                "optim.backbone_lr is set but model.train_backbone is none; leave it out, or set model.train_backbone "
                "to decoder or all"
            )
        return self

    @model_validator(mode="after")
    def _check_no_credentials(self) -> Config:
        for url in (self.out, self.data.train, self.data.val, self.model.pretrained):
            check_no_credentials(str(url))
        return self

    @property
    def out_is_url(self) -> bool:
        """True if `out` is an object store."""
        return "://" in str(self.out)

    @property
    def folder(self) -> Path:
        """Folder that the run writes on this machine: `out`, or a temporary folder that is uploaded to `out`."""
        if not self.out_is_url:
            return Path(self.out)
        # several machines or users may share one temporary folder
        owner = f"{str(self.out).rstrip('/')} {socket.gethostname()} {os.getuid()}"
        return Path(tempfile.gettempdir()) / f"msvae-{hashlib.sha256(owner.encode()).hexdigest()[:16]}"

    def accumulation_steps(self, world_size: int) -> int:
        """Return the number of micro batches of each rank in one global batch.

        Raises: ValueError if the global batch cannot be divided evenly among ranks and micro batches.
        """
        data = self.data
        steps, rest = divmod(data.global_batch_size, world_size * data.micro_batch_size)
        if rest or not steps:
            raise ValueError(
                f"data.global_batch_size is {data.global_batch_size}, expected a multiple of {world_size} ranks x "
                f"data.micro_batch_size {data.micro_batch_size}; change one of them, or the number of ranks"
            )
        return steps

    def dump(self) -> str:
        """Return the resolved configuration as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read YAML, then apply `--section.key value` overrides.

    Raises: ValueError if the file is missing, a key is unknown (it names the nearest key), or a value is invalid.
    """
    values = {} if path is None else _read_yaml(path)
    for option in overrides:
        key = option.removeprefix("--").split("=")[0]
        if option.startswith("--") and key not in (*valid_keys(), "help"):
            raise ValueError(_unknown(key, "command line"))
    try:
        return Config(_cli_parse_args=list(overrides), **values)
    except ValidationError as error:
        raise ValueError("\n".join(_explain(fault, path) for fault in error.errors())) from None
    except SettingsError as error:
        raise ValueError(f"command line: {error}; overrides look like --train.max_steps 100") from None


def valid_keys() -> list[str]:
    """Return every dotted key and every section."""
    keys = []
    for name, field in Config.model_fields.items():
        keys.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += [f"{name}.{inner}" for inner in field.annotation.model_fields]
    return keys


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"configuration {path} does not exist; msvae's own configurations are in configs/train/")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"configuration {path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"configuration {path} holds {type(values).__name__}, expected sections such as `train:`")
    return values


def _unknown(key: str, source: str) -> str:
    nearest = difflib.get_close_matches(key, valid_keys(), n=1, cutoff=0.0)[0]
    return f"{source}: key {key} is unknown; did you mean {nearest}?"


def _explain(fault: Any, path: Path | None) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    source = "command line" if path is None else str(path)
    if fault["type"] == "extra_forbidden":
        return _unknown(key, source)
    if fault["type"] == "value_error":
        return f"{source} and overrides: {key}{': ' if key else ''}{fault['ctx']['error']}"
    return f"{source} and overrides: {key} is {fault['input']!r}: {fault['msg']}"
