"""Bytes: what autograd keeps for the backward, and the most that a process held."""

import ctypes
import resource
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd saves while it is entered, each storage once, parameters excepted."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {one.untyped_storage().data_ptr() for one in parameters}
        self._kept: dict[int, Any] = {}  # the storages, lest one is freed and its place used again
        super().__init__(self._keep, lambda tensor: tensor)

    def __enter__(self) -> "Saved":  # type: ignore[override]  # torch gives None
        super().__enter__()
        return self

    def _keep(self, tensor: Tensor) -> Tensor:
        # What an all-to-all is still filling only stands for the tensor that has the storage.
        own = tensor.elem if isinstance(tensor, AsyncCollectiveTensor) else tensor
        storage = own.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            self._kept[storage.data_ptr()] = storage
        return tensor

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Peaks since the start: of the process, and on a GPU of PyTorch's allocator."""
    peaks = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if device.type == "cuda":
        peaks["allocator"] = torch.cuda.max_memory_allocated(device)
    return peaks


def peak_growth(work: Callable[[], object], device: torch.device) -> int | None:
    """The most that `work` needed beyond what was there before: of PyTorch's allocator on a GPU,
    else of the process. None where the system has no peak that can be set back.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is no longer resident
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak is now what is resident
    except (AttributeError, OSError):
        return None
    before = _resident_peak()
    work()
    return _resident_peak() - before


def _resident_peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux tells VmHWM")
