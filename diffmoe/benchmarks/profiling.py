"""What a piece of work asks of a GPU: kernels, copies and waits; and a picture of it over time."""

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from diffmoe.benchmarks.report import Report
from diffmoe.benchmarks.timing import synchronize


class Use(NamedTuple):
    """Of a GPU by one call. copies: and fills of memory. busy: seconds, summed over streams."""

    kernels: int
    copies: int
    busy: float

    @classmethod
    def of(cls, events: Iterable[FunctionEvent]) -> "Use":
        # Ranges that the host named are repeated on the device's line: they are no work.
        own = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        copies = sum(event.name.startswith(("Memcpy", "Memset")) for event in own)
        busy = sum(event.time_range.elapsed_us() for event in own) / 1e6
        return cls(len(own) - copies, copies, busy)


def profiled(
    work: Callable[[], object], device: torch.device, trace: Path | None = None
) -> list[FunctionEvent]:
    """All events of one call. trace: gets it as JSON for Chrome or Perfetto; on a CPU, too."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    synchronize(device)
    with profile(activities=activities) as seen:
        work()
        synchronize(device)
    if trace is not None:
        seen.export_chrome_trace(str(trace))
    return list(seen.events() or [])


def waits(work: Callable[[], object]) -> int:
    """How often the host waits for a value or a copy of the GPU in one call, as torch notices."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(one.message) for one in seen)


def add_use(
    report: Report,
    name: str,
    work: Callable[[], object],
    device: torch.device,
    trace: Path | None = None,
) -> None:
    """Figures of one call of what has run before: on a CPU only the trace, and a note."""
    if device.type != "cuda":
        report.note("kernels, copies and waits for the device: only on a GPU")
        if trace is not None:
            profiled(work, device, trace)
        return
    use = Use.of(profiled(work, device, trace))
    report.add(f"{name}: kernels", use.kernels, "")
    report.add(f"{name}: copies and fills", use.copies, "")
    report.add(f"{name}: the device is at work", use.busy * 1e3, "ms")
    report.add(f"{name}: waits for the device", waits(work), "")
