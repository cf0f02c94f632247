"""Settings of DeepSpeed: which of them the user may choose, and which the run sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SET_BY_RUN = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "steps_per_print", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
)  # fmt: skip
"""Keys whose values the run replaces."""
MONITORING = ("comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state")
ZERO = (
    "stage", "offload_optimizer", "offload_param", "overlap_comm", "contiguous_gradients", "reduce_scatter",
    "reduce_bucket_size", "allgather_partitions", "allgather_bucket_size", "sub_group_size",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_gather_16bit_weights_on_model_save", "ignore_unused_parameters",
)  # fmt: skip
"""Keys of `zero_optimization` that change speed and memory, but not results."""
HYBRID_OFFLOAD = {"ratio": 1.0, "super_offload": False}
"""Keys of `offload_optimizer` that need DeepSpeed's own Adam, and their default values."""
PRECISIONS = ("fp16", "bf16", "amp", "torch_autocast")


def check_deepspeed_config(config: Mapping[str, Any]) -> None:
    """Check the DeepSpeed configuration that the launcher passes.

    Raises: ValueError if a setting changes what is trained, or makes checkpoints useless under other engines.
    """
    zero = config["zero_optimization"]
    if zero["stage"] not in (1, 2, 3):
        raise ValueError(
            f"DeepSpeed's zero stage is {zero['stage']}, expected 1, 2 or 3; without sharding use multi_gpu.yaml"
        )
    for part in ("offload_optimizer", "offload_param"):
        if (device := (zero.get(part) or {}).get("device") or "none") not in ("none", "cpu"):
            raise ValueError(
                f"DeepSpeed's {part} has the device {device}, expected cpu or none; use zero3_offload.yaml"
            )
    for name in PRECISIONS:
        if (config.get(name) or {}).get("enabled"):
            raise ValueError(
                f"DeepSpeed's configuration enables {name}, expected float32 weights; remove it and pass "
                "`--mixed_precision bf16` or fp16 to accelerate launch"
            )
    unknown = [name for name in config if name not in (*SET_BY_RUN, *MONITORING, *PRECISIONS, "zero_optimization")]
    unknown += [f"zero_optimization.{name}" for name, value in zero.items() if name not in ZERO and value]
    offload = zero.get("offload_optimizer") or {}
    unknown += [
        f"zero_optimization.offload_optimizer.{name}"
        for name, default in HYBRID_OFFLOAD.items()
        if offload.get(name, default) != default
    ]
    if unknown:
        raise ValueError(
            f"DeepSpeed's configuration sets {', '.join(unknown)}, expected only its zero_optimization; remove them: "
            "the run's own configuration sets optimizer, learning rates, batches and clipping"
        )


def apply_run_settings(config: dict[str, Any], max_norm: float, accumulation_steps: int, world_size: int) -> None:
    """Replace the values of `SET_BY_RUN` in a DeepSpeed configuration by those of the run."""
    values = {
        # these count micro batches, whatever their size
        "train_batch_size": accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_norm,
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,
        # DeepSpeed's own Adam does not average the weights
        "zero_force_ds_cpu_optimizer": False,
    }
    assert set(values) == set(SET_BY_RUN)
    config |= values
