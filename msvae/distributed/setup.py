"""Set-up of Accelerate: join the processes that the launcher started, or refuse to train alone."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from datetime import timedelta
from pathlib import Path
from typing import get_args

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from msvae.distributed.collectives import Ranks
from msvae.distributed.deepspeed_settings import check_deepspeed_config
from msvae.distributed.precision import Precision

LAUNCHED_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Environment variables in which Open MPI, other MPIs and srun state how many processes they started. torchrun's
WORLD_SIZE has priority."""

SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.DEEPSPEED,
)


def join_ranks(timeout_s: float = 1800.0) -> Ranks:
    """Join the other ranks: on GPUs where CUDA is available, else on CPUs with gloo.

    Mixed precision is off in Accelerate. The training step applies `launched_precision`, so that the precision is the
    same under every engine.

    Args: seconds that a collective may wait for other ranks.
    Raises: ValueError if the launcher started more processes than joined, or asks for an unsupported engine.
    """
    on_gpu, precision = torch.cuda.is_available(), launched_precision()
    if on_gpu:
        make_cuda_exact()
        torch.backends.cudnn.allow_tf32 = precision != "no"
    # torch renamed the option, accelerate still passes it under its old name
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if uses_deepspeed:
        _silence_deepspeed(on_gpu)
    accelerator = Accelerator(
        # with cpu=True accelerate would ignore DeepSpeed without a message
        cpu=not on_gpu and not uses_deepspeed,
        mixed_precision="no",
        kwargs_handlers=[
            # buffers are constants here, and broadcasting them would be a collective in every forward pass
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(
                backend="gloo" if uses_deepspeed and not on_gpu else None, timeout=timedelta(seconds=timeout_s)
            ),
        ],
    )
    check_all_joined(accelerator.num_processes)
    if accelerator.distributed_type not in SUPPORTED:
        raise ValueError(
            f"the launcher asks for {accelerator.distributed_type}, expected one of "
            f"{', '.join(str(kind.value) for kind in SUPPORTED)}; use a file of configs/accelerate/"
        )
    if uses_deepspeed:
        check_deepspeed_config(accelerator.state.deepspeed_plugin.deepspeed_config)
    return Ranks(accelerator)


def launched_precision() -> Precision:
    """Return the mixed precision that the launcher asks for.

    Raises: ValueError if it is unknown.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    for precision in get_args(Precision):
        if asked == precision:
            return precision  # type: ignore[no-any-return]
    raise ValueError(
        f"the launcher asks for mixed precision {asked}, expected one of {', '.join(get_args(Precision))}"
    )


def make_cuda_exact() -> None:
    """Choose CUDA kernels that add in a fixed order and in full float32, so that a resumed run repeats every bit."""
    # TF32 would round convolutions in float32 to 11 bits
    torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # with warn_only, the backward passes of these kernels would still add in a random order
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    # every buffer here is written before it is read
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def launched_processes() -> int:
    """Return the number of processes that the launcher started."""
    world_size = os.environ.get("WORLD_SIZE")
    return int(world_size) if world_size else max(int(os.environ.get(name, 1)) for name in LAUNCHED_SIZES)


def check_all_joined(joined: int) -> None:
    """Check that all processes that were launched have joined.

    Raises: ValueError if some did not. They would train separate models.
    """
    launched = launched_processes()
    if launched != joined:
        raise ValueError(
            f"the launcher started {launched} processes but {joined} joined, so they would train separate models; "
            "launch with `accelerate launch --config_file configs/accelerate/cpu.yaml` (or multi_gpu.yaml)"
        )
    # without mpirun accelerate's MULTI_CPU launcher sets an address for several processes, but starts only one
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate was asked for several processes and started one (its MULTI_CPU type needs mpirun); "
            "launch with `--config_file configs/accelerate/cpu.yaml`, or add `--num_processes 1`"
        )


def check_writable(folder: Path) -> None:
    """Check that a folder can be created and written to. Nothing is left behind.

    Raises: ValueError if it cannot.
    """
    nearest = nearest_existing(folder)
    try:
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise ValueError(f"cannot write {folder} ({error.strerror}: {nearest}); choose a writable folder") from error


def nearest_existing(folder: Path) -> Path:
    """Return the folder itself if it exists, else its nearest parent that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _silence_deepspeed(on_gpu: bool) -> None:
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        # DeepSpeed would compile kernels that training does not use, which fails on a machine without a compiler
        deepspeed.ops.__compatible_ops__ = {}
