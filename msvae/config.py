"""The configuration of a run: typed YAML with dotted overrides, where an unknown key is an error.

`--config FILE` is read first, then `--section.key value` replaces single values. Nothing comes from the environment.
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

from msvae.credentials import refuse_in_url


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """Which VAE is adapted, and how."""

    pretrained: str = "stabilityai/stable-diffusion-3-medium-diffusers"
    """Hub id or folder of an AutoencoderKL or a pipeline that holds one, or `tiny`: a small one without weights."""
    adapter_placement: Literal["both", "input", "output"] = "both"
    """Adapters on both sides, or on one while the other side's convolution is widened to all bands."""
    adapter_init: Literal["random", "rgb", "pca"] = "pca"
    """How adapters begin: at random, with red, green and blue as themselves, or as principal components."""
    adapter_form: Literal["residual", "convolution"] = "residual"
    """A linear map plus three convolutions that start at zero, or the three convolutions alone, begun at random."""
    adapter_width: PositiveInt = 32
    """Channels of the adapters' convolutions."""
    use_spectral_attention: bool = True
    """Weigh the bands by the mean leaf spectrum, on both sides."""
    train_backbone: Literal["none", "decoder", "all"] = "none"
    """What of the backbone is trained beside the adapters. `tiny` needs `all`. Unless it is `all`, placement `output`
    trains nothing before the latents."""
    sample_posterior: bool = True
    """Draw latents from the posterior while training; off, its mode is taken. Evaluation always takes the mode."""


class DataConfig(_Section):
    """Which shards are read, and how they are cut into batches."""

    train: str = "shards/train"
    """Folder or URL (s3://, gs://, az://, https://) of the training split, made by `msvae pack`."""
    val: str | None = "shards/val"
    """Folder or URL of the validation split; null trains without validation."""
    cache: Path | None = None
    """Folder on a local disk that keeps what was read from a URL, for all ranks of a machine; null keeps nothing."""
    cache_gb: PositiveFloat = 100.0
    """Size of the cache; what was kept first goes first."""
    max_bad_samples: NonNegativeInt = 0
    """Samples that may be unreadable, and are replaced and listed in `bad-samples/`, before training stops."""
    global_batch_size: PositiveInt = 32
    """Tiles per optimizer step over all ranks. Accumulation follows, so the result does not change with the GPUs."""
    micro_batch_size: PositiveInt = 8
    """Tiles that one rank puts through the model at once."""
    num_workers: NonNegativeInt = 2
    """Reader threads a rank; 0 reads between the steps."""
    flips: bool = False
    """Mirror training tiles at random."""
    quarter_turns: bool = False
    """Turn training tiles by 0, 90, 180 or 270 degrees at random."""
    crop_px: PositiveInt | None = None
    """Side of the square cut out of each training tile at random; null trains on whole tiles."""
    background: Literal["fill", "keep"] = "fill"
    """`fill` hides everything off the leaf from the encoder; `keep` shows it."""
    low_coverage: float = Field(0.1, ge=0, le=1)
    """Leaf share of a global batch under which a warning names its emptiest tiles."""
    high_coverage: float = Field(0.95, ge=0, le=1)
    """Leaf share of a global batch above which a warning names its fullest tiles."""
    max_nonfinite_share: float = Field(0.001, ge=0, le=1)
    """Share of leaf values that may be NaN or infinite, and are left out, before training stops."""
    check_every: PositiveInt = 100
    """Steps between looks at coverage and at values that are not finite: at most one warning of a kind each time."""
    trace: bool = False
    """Write which samples each step saw to `trace/rank-00000.jsonl`."""

    @model_validator(mode="after")
    def _low_is_under_high(self) -> DataConfig:
        if self.low_coverage >= self.high_coverage:
            raise ValueError(
                f"low_coverage is {self.low_coverage:g} and high_coverage {self.high_coverage:g}; "
                "expected the first under the second"
            )
        return self


UNCOMPARED = {"range", "kl"}
"""Loss terms of the reconstruction or the posterior alone, which say nothing of the original."""


class LossConfig(_Section):
    """Weights of the terms, all on leaf pixels alone. A term at 0 is off and not computed."""

    mse_weight: NonNegativeFloat = 1.0
    """Squared error, in units of each band's variance over training leaves."""
    l1_weight: NonNegativeFloat = 0.0
    """Absolute error, in units of each band's standard deviation."""
    huber_weight: NonNegativeFloat = 0.0
    """Huber's error: half the square up to one standard deviation of the band, linear beyond."""
    sam_weight: NonNegativeFloat = 1.0
    """Spectral angle, in radians."""
    cosine_weight: NonNegativeFloat = 0.0
    """1 - cos of the spectral angle: gentler than the angle where it is small."""
    signature_weight: NonNegativeFloat = 0.0
    """Squared error of each tile's mean leaf spectrum, in units of each band's variance."""
    range_weight: NonNegativeFloat = 0.0
    """Squared distance of reconstructed reflectance from 0..1, in units of each band's variance."""
    index_weight: NonNegativeFloat = 0.0
    """Absolute error of NDVI and NDRE, the mean of those that the bands allow."""
    kl_weight: NonNegativeFloat = 1e-6
    """KL divergence of the posterior, in nats per latent cell. Not part of the validation loss."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every term that is on."""
        return {name.removesuffix("_weight"): weight for name, weight in self if weight}

    @model_validator(mode="after")
    def _something_is_trained(self) -> LossConfig:
        if not self.weights.keys() - UNCOMPARED:
            raise ValueError(
                "mse_weight, sam_weight and all other weights that compare with the original are 0 (range and kl do "
                "not), so nothing would be trained; set one above 0"
            )
        return self


class OptimConfig(_Section):
    """AdamW, its learning rate over time, and the moving average of the weights."""

    lr: NonNegativeFloat = 1e-4
    """Peak learning rate of adapters and attention."""
    backbone_lr: NonNegativeFloat | None = None
    """Peak learning rate of what is trained of the backbone; null is `lr`."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of AdamW's moments."""
    warmup_steps: NonNegativeInt = 100
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Course of the learning rate after warm-up, down to 0 at the last step unless constant."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Largest gradient norm; larger gradients are scaled down to it. 0 is off."""
    ema_decay: float = Field(0.999, ge=0, lt=1)
    """Decay of the moving average of the weights, which is evaluated and saved. 0 is off."""


class TrainConfig(_Section):
    """How long, and what happens on the way."""

    max_steps: PositiveInt = 10_000
    """Optimizer steps."""
    seed: NonNegativeInt = 0
    """Decides new weights, the order of samples and the noise of each sample."""
    log_every: PositiveInt = 1
    """Steps between log lines; each costs one wait for the device."""
    eval_every: NonNegativeInt = 500
    """Steps between evaluations on the validation split; 0 evaluates only before and after."""
    checkpoint_every: NonNegativeInt = 500
    """Steps between checkpoints; 0 writes only the last."""
    keep_checkpoints: PositiveInt = 3
    """Newest checkpoints that are kept."""
    resume: str = "auto"
    """`auto` goes on from the newest checkpoint under `out`, `never` wants an empty one, or a checkpoint's path."""
    patience: NonNegativeInt = 0
    """Evaluations in a row without a lower validation loss after which training ends; 0 never ends it early."""
    max_nonfinite_steps: PositiveInt = 10
    """Steps in a row whose gradient may be NaN or infinite, and change nothing, before training stops."""
    timeout_s: PositiveFloat = 1800.0
    """How long a rank waits for the others before it gives up."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Keep images with bands innermost in memory."""
    gradient_checkpointing: bool = False
    """Compute the backbone's activations twice rather than keep them: less memory, more time."""


class Config(BaseSettings):
    """Everything that decides a run."""

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
    """Folder or URL (s3://, gs://, az://) that the run writes; it may hold an earlier part of the same run."""

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, *_: Any, **__: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Values from YAML alone; pydantic-settings puts command line overrides in front of them."""
        return (init_settings,)

    @model_validator(mode="after")
    def _rates_are_used(self) -> Config:
        if self.optim.backbone_lr is not None and self.model.train_backbone == "none":
            raise ValueError("optim.backbone_lr is set but model.train_backbone is none; leave it out, or train more")
        return self

    @model_validator(mode="after")
    def _no_credentials(self) -> Config:
        for url in (self.out, self.data.train, self.data.val, self.model.pretrained):
            refuse_in_url(str(url))
        return self

    @property
    def out_is_url(self) -> bool:
        """Whether `out` is an object store."""
        return "://" in str(self.out)

    @property
    def folder(self) -> Path:
        """Where the run writes on this machine: `out`, or among temporary files where a mirror of its URL lies."""
        if not self.out_is_url:
            return Path(self.out)
        # machines may share their temporary folder, and so may users
        owner = f"{str(self.out).rstrip('/')} {socket.gethostname()} {os.getuid()}"
        return Path(tempfile.gettempdir()) / f"msvae-{hashlib.sha256(owner.encode()).hexdigest()[:16]}"

    def accumulation_steps(self, world_size: int) -> int:
        """Micro batches of each rank in one global batch.

        Raises: ValueError if the global batch cannot be divided evenly.
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
        """The resolved configuration as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read YAML, then apply `--section.key value` overrides.

    Raises: ValueError for a missing file, an unknown key (naming the nearest) or a value of the wrong type.
    """
    values = {} if path is None else _read_yaml(path)
    for option in overrides:
        key = option.removeprefix("--").split("=")[0]
        if option.startswith("--") and key not in (*valid_keys(), "help"):
            raise ValueError(_unknown(key, "command line"))
    try:
        return Config(_cli_parse_args=list(overrides), **values)
    except ValidationError as error:
        raise ValueError("\n".join(_explained(fault, path) for fault in error.errors())) from None
    except SettingsError as error:
        raise ValueError(f"command line: {error}; overrides look like --train.max_steps 100") from None


def valid_keys() -> list[str]:
    """Every dotted key, sections included."""
    keys = []
    for name, field in Config.model_fields.items():
        keys.append(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += [f"{name}.{inner}" for inner in field.annotation.model_fields]
    return keys


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"configuration {path} does not exist; those that come with msvae are in configs/train/")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"configuration {path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"configuration {path} holds {type(values).__name__}, expected sections such as `train:`")
    return values


def _unknown(key: str, place: str) -> str:
    nearest = difflib.get_close_matches(key, valid_keys(), n=1, cutoff=0.0)[0]
    return f"{place}: key {key} is unknown; did you mean {nearest}?"


def _explained(fault: Any, path: Path | None) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    place = "command line" if path is None else str(path)
    if fault["type"] == "extra_forbidden":
        return _unknown(key, place)
    if fault["type"] == "value_error":
        return f"{place} and overrides: {key}{': ' if key else ''}{fault['ctx']['error']}"
    return f"{place} and overrides: {key} is {fault['input']!r}: {fault['msg']}"
