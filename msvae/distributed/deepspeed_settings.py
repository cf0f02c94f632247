"""What of DeepSpeed's own configuration can be chosen, and what a run decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

OWN = {
    "train_batch_size": "data.global_batch_size",
    "train_micro_batch_size_per_gpu": "data.micro_batch_size",
    "gradient_accumulation_steps": "data.global_batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "steps_per_print": "train.log_every",
    "zero_allow_untested_optimizer": "optim",
    "zero_force_ds_cpu_optimizer": "optim",
}
"""Keys whose values are put in place of the user's own, and the option behind each."""
OBSERVES = ("comms_logger", "flops_profiler", "wall_clock_breakdown", "memory_breakdown", "dump_state")
ZERO = (
    "stage", "offload_optimizer", "offload_param", "overlap_comm", "contiguous_gradients", "reduce_scatter",
    "reduce_bucket_size", "allgather_partitions", "allgather_bucket_size", "sub_group_size",
    "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_prefetch_bucket_size",
    "stage3_param_persistence_threshold", "stage3_gather_16bit_weights_on_model_save", "ignore_unused_parameters",
)  # fmt: skip
"""Keys of `zero_optimization` that change speed and memory, not results."""
HYBRID_OFFLOAD = {"ratio": 1.0, "super_offload": False}
"""Keys that need DeepSpeed's own Adam, and their usual values."""
PRECISIONS = ("fp16", "bf16", "amp", "torch_autocast")


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Look through the settings that the launcher gives DeepSpeed.

    Raises: ValueError for those that would change what is trained or could not be saved for another engine.
    """
    zero = config["zero_optimization"]
    if zero["stage"] not in (1, 2, 3):
        raise ValueError(
            f"DeepSpeed's zero stage is {zero['stage']}, expected 1, 2 or 3; without sharding use multi_gpu.yaml"
        )
    for part in ("offload_optimizer", "offload_param"):
        if (device := (zero.get(part) or {}).get("device") or "none") not in ("none", "cpu"):
            raise ValueError(f"DeepSpeed's {part} goes to {device}, expected cpu or none; use zero3_offload.yaml")
    for name in PRECISIONS:
        if (config.get(name) or {}).get("enabled"):
            raise ValueError(
                f"DeepSpeed's configuration turns {name} on; leave it out and say `--mixed_precision bf16` or fp16 to "
                "accelerate launch, so that weights stay float32"
            )
    unknown = [name for name in config if name not in (*OWN, *OBSERVES, *PRECISIONS, "zero_optimization")]
    unknown += [f"zero_optimization.{name}" for name, value in zero.items() if name not in ZERO and value]
    offload = zero.get("offload_optimizer") or {}
    unknown += [
        f"zero_optimization.offload_optimizer.{name}"
        for name, usual in HYBRID_OFFLOAD.items()
        if offload.get(name, usual) != usual
    ]
    if unknown:
        raise ValueError(
            f"DeepSpeed's configuration sets {', '.join(unknown)}, expected only its zero_optimization; leave it out: "
            "optimizer, learning rates, batches and clipping are those of the run's own configuration"
        )


def put_own(config: dict[str, Any], max_norm: float, accumulation_steps: int, world_size: int) -> None:
    """Put what the run decides in place of what the launcher said."""
    values = {
        # micro batches are counted, whatever their size
        "train_batch_size": accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": max_norm,
        "steps_per_print": 2**62,
        "zero_allow_untested_optimizer": True,
        # its own Adam knows no average of the weights
        "zero_force_ds_cpu_optimizer": False,
    }
    assert values.keys() == OWN.keys()
    config |= values
