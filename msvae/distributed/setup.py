"""Joining the processes that a launcher started, and refusing to train secretly alone."""

from __future__ import annotations

import atexit
import errno
import json
import logging
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs

from msvae.credentials import hidden
from msvae.distributed.deepspeed_settings import refuse_unsupported
from msvae.distributed.exhausted import out_of_memory_message
from msvae.distributed.exit_codes import EXIT_CODE as LOST_OTHERS
from msvae.distributed.exit_codes import lost_ranks_message
from msvae.distributed.precision import Precision

LAUNCHED_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where Open MPI, other MPIs and srun say how many processes they started; torchrun's WORLD_SIZE goes before them."""

EXIT_CODES = "MSVAE_EXIT_CODES"
"""Names a folder where each local rank leaves its exit code: launchers hide it. `launch/node.sh` looks there."""
MAIN_RANK_FIRST_S = 5.0
DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)

SUPPORTED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.DEEPSPEED,
)


def join_ranks(timeout_s: float = 1800.0) -> Accelerator:
    """The accelerator of this process: GPUs where there are some, else CPU with gloo.

    It is told of no mixed precision: `launched_precision` is for the step to apply, alike under every engine.

    Raises: ValueError when the launcher started more processes than joined, or asks for an unsupported engine.
    """
    on_gpu, precision = torch.cuda.is_available(), launched_precision()
    if on_gpu:
        make_cuda_exact()
        torch.backends.cudnn.allow_tf32 = precision != "no"
    # torch renamed the option, accelerate still passes it under its old name
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if deepspeed:
        _quieten_deepspeed(on_gpu)
    accelerator = Accelerator(
        # with cpu=True accelerate would leave DeepSpeed aside without a word
        cpu=not on_gpu and not deepspeed,
        mixed_precision="no",
        kwargs_handlers=[
            # buffers are constants here, and broadcasting them would be a collective in every forward pass
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            InitProcessGroupKwargs(
                backend="gloo" if deepspeed and not on_gpu else None, timeout=timedelta(seconds=timeout_s)
            ),
        ],
    )
    refuse_alone(accelerator.num_processes)
    if accelerator.distributed_type not in SUPPORTED:
        raise ValueError(
            f"the launcher asks for {accelerator.distributed_type}, this version trains on "
            f"{', '.join(str(kind.value) for kind in SUPPORTED)}; use a file of configs/accelerate/"
        )
    if deepspeed:
        refuse_unsupported(accelerator.state.deepspeed_plugin.deepspeed_config)
    return accelerator


def launched_precision() -> Precision:
    """The mixed precision that the launcher asks for.

    Raises: ValueError for one that is not known.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    for precision in get_args(Precision):
        if asked == precision:
            return precision  # type: ignore[no-any-return]
    raise ValueError(
        f"the launcher asks for mixed precision {asked}, expected one of {', '.join(get_args(Precision))}"
    )


def _quieten_deepspeed(on_gpu: bool) -> None:
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        # it would compile kernels of its own, which training does not use and a machine without a compiler cannot
        deepspeed.ops.__compatible_ops__ = {}


def make_cuda_exact() -> None:
    """Kernels that add in a fixed order, so that a resumed run repeats every bit, and float32 as it is."""
    # convolutions in float32 would be rounded to 11 bits
    torch.backends.cudnn.allow_tf32 = False
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # under warn_only these add in any order in their backward pass
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    # every buffer here is written before it is read
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def engine_name(accelerator: Accelerator) -> str:
    """How the ranks train together, such as `MULTI_GPU` or `DEEPSPEED, ZeRO 2`."""
    plugin = accelerator.state.deepspeed_plugin
    kind = str(accelerator.distributed_type.value)
    return kind if plugin is None else f"{kind}, ZeRO {plugin.zero_stage}"


def launched_processes() -> int:
    """How many processes the launcher says that it started."""
    told = os.environ.get("WORLD_SIZE")
    return int(told) if told else max(int(os.environ.get(name, 1)) for name in LAUNCHED_SIZES)


def refuse_alone(joined: int) -> None:
    """Compare the processes that joined with those that were launched.

    Raises: ValueError when they differ.
    """
    launched = launched_processes()
    if launched != joined:
        raise ValueError(
            f"the launcher started {launched} processes but {joined} joined: they would train apart, not together; "
            "launch with `accelerate launch --config_file configs/accelerate/cpu.yaml` (or multi_gpu.yaml)"
        )
    # accelerate's MULTI_CPU launcher without mpirun names a meeting point for several processes and starts one
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate was asked for several processes and started one (its MULTI_CPU type needs mpirun); "
            "launch with `--config_file configs/accelerate/cpu.yaml`, or add `--num_processes 1`"
        )


def check_writable(folder: Path) -> None:
    """See that a folder can be made and written to, without leaving a trace.

    Raises: ValueError naming it when it cannot.
    """
    nearest = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    try:
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        raise ValueError(f"cannot write {folder} ({error.strerror}: {nearest}); choose a writable folder") from error


def run_script(
    main: Callable[[], int | None],
    when_stopped: str = "stopped",
    when_exhausted: str = "free some, or use a larger one",
) -> NoReturn:
    """Run an entry point and end with the exit code that it returns, 0 when it returns none.

    A user's error becomes one line, exit code 2, and the last words of torchrun's summary. So does a disk that fails
    or is full, and a memory that is. A rank that merely lost others says so, leaves the last words to them, and ends
    with 69.
    """
    rank = int(os.environ.get("RANK", 0))
    # one of before a restart would be taken for ours
    _leave_code("")
    try:
        _leave(main() or 0)
    except ValueError as error:
        if rank:
            # most errors meet all ranks alike: rank 0 speaks for them, and the launcher then ends the others
            time.sleep(MAIN_RANK_FIRST_S)
        _end(_say(rank, str(error)))
    except (OSError, RuntimeError, MemoryError) as error:
        if (memory := out_of_memory_message(error)) is not None:
            _end(_say(rank, f"too little memory ({memory}); {when_exhausted}"))
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            _end(_say(rank, f"{error}: the disk is full or fails; mend it, then run the same command again"))
        if (lost := lost_ranks_message(error)) is None:
            raise
        line = _say(rank, lost)
        # the launcher ends this rank as soon as it has seen the one that failed first
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(MAIN_RANK_FIRST_S)
        _end(line, LOST_OTHERS)
    except KeyboardInterrupt:
        if rank == 0:
            print(when_stopped, file=sys.stderr, flush=True)
        _leave(130)


def _say(rank: int, message: str) -> str:
    line = hidden(f"error on rank {rank}: {message}" if rank else f"error: {message}")
    print(line, file=sys.stderr, flush=True)
    return line


def _end(line: str, exit_code: int = 2) -> NoReturn:
    if summary := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(summary).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))
    _leave(exit_code)


def _leave(exit_code: int) -> NoReturn:
    """End the process, but not the interpreter first.

    A thread of gloo that lets go of its last tensor while the interpreter ends would abort the process.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    _leave_code(str(exit_code))
    os._exit(exit_code)


def _leave_code(text: str) -> None:
    if folder := os.environ.get(EXIT_CODES):
        # whoever asked for it may be gone
        with suppress(OSError):
            Path(folder, os.environ.get("LOCAL_RANK", "0")).write_text(text)
