"""What a smaller capacity saves when images are drawn."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from diffmoe.benchmarks.profiling import add_use
from diffmoe.benchmarks.report import Report
from diffmoe.benchmarks.timing import take_turns
from diffmoe.benchmarks.training import dense_twin, gemm_of
from diffmoe.capacity.calibration import Passes, calibrate
from diffmoe.capacity.forward import Observer
from diffmoe.config import Config
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.models.dit import DiT
from diffmoe.models.precision import DTYPES
from diffmoe.models.routing_mode import RoutingMode
from diffmoe.planning.flops import forward_flops
from diffmoe.planning.layouts import Layout
from diffmoe.sampling.sampler import Sampler


def benchmark_sampling(
    config: Config,
    steps: int,
    rounds: int,
    device: torch.device,
    report: Report,
    trace: Path | None = None,
) -> None:
    """A batch of the recipe's network with random weights, at its capacity and at the half.

    Thresholds are calibrated for each. In bf16 where the recipe trains so. trace: gets one batch.
    """
    capacities = (config.moe.capacity, config.moe.capacity / 2)
    images = config.training.batch_size
    labels = [index % config.model.num_classes for index in range(images)]
    settings = SamplingSettings(steps=steps)
    network = DiT(config.model, config.moe, seed=config.seed).to(device).eval()
    twin = dense_twin(config)
    dense = DiT(twin.model, twin.moe, seed=config.seed).to(device).eval()

    if config.training.precision == "bf16":
        for one in (network, dense):
            one.compute_in(torch.bfloat16)

    def draw(observe: Observer | None = None) -> None:
        Sampler(network, config).latents(labels, settings, observe=observe)

    thresholds, measured = {}, {}
    for capacity in capacities:
        passes = Passes(steps, draw)
        thresholds[capacity], measured[capacity] = calibrate(network, capacity, passes)

    def at(capacity: float) -> None:
        network.routing = RoutingMode(calibrated_LE=thresholds[capacity])
        draw()

    works: dict[str, Callable[[], object]] = {f"capacity {c:g}": partial(at, c) for c in capacities}
    works["dense"] = lambda: Sampler(dense, twin).latents(labels, settings)
    layout = Layout(config, 1, 1)
    gemm, gemm_flops = gemm_of(layout, DTYPES[config.training.precision], device)
    timed = take_turns({"GEMM": gemm, **works}, rounds, device)

    def add_mfu(name: str, of: Layout) -> None:
        share = steps * forward_flops(of) / gemm_flops * timed.ratio("GEMM", name)
        report.add(f"{name}: MFU, of the GEMM's rate", share, "")

    for capacity in capacities:
        name = f"capacity {capacity:g}"
        report.add(f"{name}: measured", measured[capacity], "")
        report.add(f"{name}: {steps} steps", timed.median(name), "s")
        report.add(f"{name}: images", images / timed.median(name), "images/s")
        tokens = images * steps * layout.tokens_per_sample
        report.add(f"{name}: tokens", tokens / timed.median(name), "tokens/s")
        add_mfu(name, layout.changed({"moe.capacity": capacity}))
    add_mfu("dense", Layout(twin, 1, 1))
    full, half = (f"capacity {c:g}" for c in capacities)
    report.add(f"{half} to {full}", timed.median(half), "s", timed.ratio(half, full), at_most=0.75)
    report.add(f"{full} to dense", timed.median("dense"), "s", timed.ratio(full, "dense"))
    for name, work in works.items():
        add_use(report, name, work, device, trace if name == full else None)
