"""What a smaller capacity saves when images are drawn."""

from collections.abc import Callable
from functools import partial

import torch

from diffmoe.benchmarks.report import Report
from diffmoe.benchmarks.timing import take_turns
from diffmoe.benchmarks.training import dense_twin
from diffmoe.capacity.calibration import Passes, calibrate
from diffmoe.capacity.forward import Observer
from diffmoe.config import Config
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.models.dit import DiT
from diffmoe.models.routing_mode import RoutingMode
from diffmoe.planning.layouts import Layout
from diffmoe.sampling.sampler import Sampler


def benchmark_sampling(
    config: Config, steps: int, rounds: int, device: torch.device, report: Report
) -> None:
    """A batch of the recipe's network with random weights, at its capacity and at the half.

    Thresholds are calibrated for each. In bf16 where the recipe trains so.
    """
    capacities = (config.moe.capacity, config.moe.capacity / 2)
    images = config.training.batch_size
    labels = [index % config.model.num_classes for index in range(images)]
    settings = SamplingSettings(steps=steps)
    network = DiT(config.model, config.moe).initialize(config.seed).to(device).eval()
    twin = dense_twin(config)
    dense = DiT(twin.model, twin.moe).initialize(config.seed).to(device).eval()

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
    timed = take_turns(works, rounds, device)
    for capacity in capacities:
        name = f"capacity {capacity:g}"
        report.add(f"{name}: measured", measured[capacity], "")
        report.add(f"{name}: {steps} steps", timed.median(name), "s")
        report.add(f"{name}: speed", images / timed.median(name), "images/s")
        tokens = images * steps * Layout(config, 1, 1).tokens_per_sample
        report.add(f"{name}: speed", tokens / timed.median(name), "tokens/s")
    full, half = (f"capacity {c:g}" for c in capacities)
    report.add(f"{half} to {full}", timed.median(half), "s", timed.ratio(half, full), at_most=0.75)
    report.add(f"{full} to dense", timed.median("dense"), "s", timed.ratio(full, "dense"))
