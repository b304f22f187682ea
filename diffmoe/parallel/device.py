"""The device of this process among those of one machine."""

import ctypes
import os
from typing import Any

import torch

from diffmoe.errors import UserError


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def default_dtype(device: str | torch.device) -> str:
    """What a trained network computes in where nobody chose: bf16 on a GPU, elsewhere fp32."""
    return "bf16" if torch.device(device).type == "cuda" else "fp32"


def setup_device(device: str | None) -> torch.device:
    """A device by name; `cuda` alone is this rank's GPU, by torchrun's or srun's local rank.

    None: cuda where there is one, else cpu.

    On a GPU fp32 products take TF32, as the paper trains; on a CPU freed memory is kept for the
    next tensors. Raises UserError for a device that is not there.
    """
    device = device or default_device()
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"--device {device}: write cpu, cuda or cuda:0") from None
    if chosen.type != "cuda":
        _keep_freed_memory()
        return chosen
    if not torch.cuda.is_available():
        raise UserError(f"--device {device}, but torch sees no GPU; use --device cpu")
    if chosen.index is None:
        local = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))
        chosen = torch.device("cuda", local % torch.cuda.device_count())
    if chosen.index >= torch.cuda.device_count():
        raise UserError(f"--device {device}: there are {torch.cuda.device_count()} GPUs")
    torch.set_float32_matmul_precision("high")
    return chosen


def use_deterministic_algorithms() -> None:
    """From here on, the same inputs give the same bits on a GPU, too.

    Call it before the first product there. An operation that has no such algorithm raises a
    RuntimeError that names it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch demands for cuBLAS
    torch.use_deterministic_algorithms(True)
    # Filling new memory with NaN finds errors, but costs a pass over it.
    deterministic: Any = torch.utils.deterministic  # its module has no annotations
    deterministic.fill_uninitialized_memory = False


def _keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back, and to map no large tensor on its own.

    A step frees what the next one asks for: pages that come anew from the system are zeroed and
    mapped each time. Another C library is left as it is.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_max, trim_threshold = -4, -1  # of malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)
