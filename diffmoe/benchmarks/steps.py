"""Whole steps as trained, back to back, beside the dense model: how much of the device they use."""

import contextlib
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from diffmoe.benchmarks.ceiling import copying, products
from diffmoe.benchmarks.profiling import add_use
from diffmoe.benchmarks.report import Report
from diffmoe.benchmarks.timing import Rounds, repeat, seconds_of, take_turns
from diffmoe.benchmarks.training import TimedStep, dense_twin, random_batches
from diffmoe.config import Config
from diffmoe.models.precision import DTYPES
from diffmoe.parallel.topology import create_topology
from diffmoe.planning.flops import step_flops
from diffmoe.planning.layouts import Layout
from diffmoe.planning.memory import MASTER, average_count, memory, moment_bytes

STEPS = 4  # of a turn: each finds the device busy with the one before, as in training
_REPEATED = 10  # of the products and copies that are held against
_COPIED = {"cpu": 2**26, "cuda": 2**30}  # bytes, far more than any cache


def benchmark_steps(
    config: Config, rounds: int, device: torch.device, report: Report, trace: Path | None = None
) -> None:
    """Figures of the recipe's step and of its dense twin's, in the recipe's precision.

    Of one process, which must have a process group. training.compile=true compiles both. trace:
    gets one step as a Chrome trace.
    """
    topology, layout = create_topology(1), Layout(config, 1, 1)
    twin = Layout(dense_twin(config), 1, 1)
    dtype = DTYPES[config.training.precision]
    model = config.model
    hidden = int(model.width * model.mlp_ratio)
    gemm, gemm_flops = products(layout.tokens, model.width, hidden, dtype, device)
    copy, copied = copying(_COPIED[device.type], device)
    works: dict[str, Callable[[], object]] = {
        "GEMM": partial(repeat, _REPEATED, gemm),
        "copy": partial(repeat, _REPEATED, copy),
    }

    with random_batches(config, topology) as batches:
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        ours = TimedStep(config, topology, device, batches)
        ours.step.phase = lambda name: contextlib.nullcontext()  # nothing waits for the device
        first = seconds_of(ours, device)
        if device.type == "cuda":
            _add_peak(report, ours, layout, held)
        dense = TimedStep(twin.config, topology, device, batches)
        dense.step.phase = ours.step.phase
        works |= {"diffmoe": partial(repeat, STEPS, ours), "dense": partial(repeat, STEPS, dense)}
        timed = take_turns(works, rounds, device)
        add_use(report, "diffmoe", ours, device, trace)
        add_use(report, "dense", dense, device)
        del ours, dense, works
        gc.collect()

    flops = gemm_flops * _REPEATED / timed.median("GEMM")
    bandwidth = copied * _REPEATED / timed.median("copy")
    report.add("first step, with compilation if asked for", first, "s")
    report.add("GEMM", flops / 1e12, "TFLOP/s")
    report.add("copy, read and written", bandwidth / 1e9, "GB/s")
    for name, of in (("diffmoe", layout), ("dense", twin)):
        _add_step(report, name, of, timed)
        moved = least_traffic(of) * STEPS / (copied * _REPEATED)
        report.add(f"{name}: memory's share", moved * timed.ratio("copy", name), "")
    report.add(
        "diffmoe to dense", timed.median("diffmoe") / STEPS, "s", timed.ratio("diffmoe", "dense")
    )
    ratio = step_flops(layout) / step_flops(twin)
    report.add("diffmoe to dense, their FLOPs", ratio, "")


def least_traffic(layout: Layout) -> int:
    """Bytes that a step moves at least: weights, gradients and optimizer state, no activations."""
    sizes = layout.sizes
    parameters = sizes.dense + sizes.experts
    weights = 3 * layout.element  # read forward and backward, written by the optimizer
    gradients = 2 * layout.zero.accumulated
    state = 2 * (1 + average_count(layout)) * MASTER
    return parameters * (weights + gradients + state) + 2 * moment_bytes(layout)


def _add_step(report: Report, name: str, layout: Layout, timed: Rounds) -> None:
    seconds = timed.median(name) / STEPS
    images = layout.config.training.batch_size / seconds
    report.add(f"{name}: step", seconds, "s")
    report.add(f"{name}: images", images, "images/s")
    report.add(f"{name}: tokens", images * layout.tokens_per_sample, "tokens/s")
    model = layout.config.model
    gemm = 6 * layout.tokens * model.width * int(model.width * model.mlp_ratio) * _REPEATED
    share = step_flops(layout) * STEPS / gemm * timed.ratio("GEMM", name)
    report.add(f"{name}: MFU, of the GEMM's rate", share, "")


def _add_peak(report: Report, step: TimedStep, layout: Layout, held: int) -> None:
    """held: bytes that were there before the step's own."""
    torch.cuda.reset_peak_memory_stats(step.device)
    step()
    torch.cuda.synchronize(step.device)
    peak = torch.cuda.max_memory_allocated(step.device) - held
    planned = memory(layout).tensors
    report.add("peak memory of tensors (ratio: to the plan's)", peak / 2**30, "GiB", peak / planned)
    report.add("peak memory of tensors, the plan's", planned / 2**30, "GiB")
