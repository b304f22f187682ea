"""Measure parts of the system on this machine. Compare figures of one run only.

  python tools/benchmark.py train --recipe diffmoe_s_e16_flow --json step.json
  python tools/benchmark.py step --recipe diffmoe_l_e16_flow --batch 64 training.precision=bf16
  python tools/benchmark.py layer [--growth [--plot growth.png]]
  python tools/benchmark.py sample | ep | data

train: whole steps through the engine beside the dense model of equal activated size; by part.
step: steps back to back, as in training, in the recipe's precision, beside the dense model: share
of the matrix products' and of the memory's rate, and on a GPU peak memory beside the plan's.
training.compile=true compiles both.
layer: one MoE layer beside a plain loop over experts, DeepSpeed's MoE and a dense MLP; or
--growth: its time and memory against experts, tokens and width.
sample: images at half the capacity beside the full one, and beside the dense model.
ep: experts shared by two ranks beside none shared, collectives counted, wide pools. The ranks take
GPUs where each has its own, else the CPU.
data: how fast moments of 4x32x32 latents come from warm files, beside a bare tarfile + np.load loop
and webdataset's own pipeline; and how long a loop that does --rate samples a second would wait.

What is compared takes turns: figures are medians over rounds, ratios medians of rounds' ratios; a
first round, with compilation and loading, does not count. On a GPU events of the device keep the
time, and short work is repeated back to back.
GEMM: plain products of the dense MLP's shapes (layer: an expert's), in the same precision on the
same device; MFU and "share of the ceiling": the model's FLOPs over what these would do meanwhile.
memory's share: the bytes that a step moves at least (weights read twice and written, gradients
written and read, optimizer state and averages read and written; no activations), over what a plain
copy moves meanwhile.
On a GPU step, layer and sample also count kernels, copies and waits for the device, as torch
notices them; --trace FILE draws one call, on a CPU, too.
--expect judges figures by a file such as diffmoe/benchmarks/aims/h100_l_e16.yaml: met or NOT met.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.cli import add_device, positive
from diffmoe.errors import UserError, run_command

if TYPE_CHECKING:
    from diffmoe.benchmarks.report import Report
    from diffmoe.config import Config


WHAT = {
    "step": "whole steps back to back, beside the dense model: how much of the device they use",
    "train": "whole steps beside the dense model of equal activated size, and their parts",
    "layer": "one MoE layer beside a loop over experts, DeepSpeed's and a dense MLP",
    "sample": "images at half the capacity beside the full one",
    "ep": "experts shared by two ranks beside none shared",
    "data": "how fast moments come from shards",
}
NARROW = {"moe.experts": 64, "moe.expert_ratio": 0.5}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("train", "step", "layer", "sample", "ep"):
        part = parts.add_parser(name, help=WHAT[name], description=WHAT[name])
        part.add_argument(
            "--recipe",
            default="diffmoe_s_e16_flow",
            help="name or YAML of a diffmoe; default diffmoe_s_e16_flow",
        )
        part.add_argument(
            "overrides", nargs="*", metavar="KEY=VALUE", help="of the recipe, as in train.py"
        )
        part.add_argument("--batch", type=positive, default=8, help="images of a step; default 8")
        part.add_argument("--rounds", type=positive, default=5, help="default 5")
        add_device(part)
        part.add_argument(
            "--threads",
            type=positive,
            help="default all cores; ep: 1 a rank",
        )
    parts.choices["layer"].add_argument(
        "--growth", action="store_true", help="time and memory against E, S, D and P instead"
    )
    parts.choices["layer"].add_argument(
        "--largest", type=positive, default=16384, help="most tokens of --growth; default 16384"
    )
    parts.choices["layer"].add_argument("--plot", type=Path, metavar="PNG", help="of --growth")
    for name, drawn in (("step", "one step"), ("layer", "our layer"), ("sample", "one batch")):
        parts.choices[name].add_argument(
            "--trace", type=Path, metavar="JSON", help=f"{drawn}, for chrome://tracing or Perfetto"
        )
        parts.choices[name].add_argument(
            "--dtype",
            choices=["fp32", "bf16"],
            help="training.precision in short; default the recipe's. fp32 on a GPU means TF32",
        )
    parts.choices["sample"].add_argument("--steps", type=positive, default=4, help="default 4")
    data = parts.add_parser("data", help=WHAT["data"], description=WHAT["data"])
    data.add_argument(
        "--workers", type=int, nargs="+", default=[0, 1, 2], help="reading; default 0 1 2"
    )
    data.add_argument("--rounds", type=positive, default=3, help="the best counts; default 3")
    data.add_argument("--samples", type=positive, default=4000, help="in the shards; default 4000")
    data.add_argument("--rate", type=float, default=5000, help="samples/s; default 5000")
    for part in parts.choices.values():
        part.add_argument("--json", type=Path, metavar="OUT", help="figures and machine, for tools")
        part.add_argument(
            "--expect",
            type=Path,
            metavar="YAML",
            help="targets in place of the usual ones: a figure's name, at_least or at_most, and a "
            "number; see diffmoe/benchmarks/aims",
        )
    return parser.parse_args()


def read_config(options: argparse.Namespace) -> Config:
    from diffmoe.benchmarks.reading import LANES
    from diffmoe.recipes import load_config

    if options.batch % LANES:
        raise UserError(f"--batch {options.batch} must be a multiple of {LANES} (lanes of data)")
    chosen = getattr(options, "dtype", None)
    dtype = [f"training.precision={chosen}"] if chosen else []
    config = load_config(options.recipe, [*options.overrides, *dtype])
    if config.model.text is not None:
        raise UserError(f"--recipe {options.recipe}: the benchmark's data has classes, no captions")
    if config.moe.type != "diffmoe":
        raise UserError(
            f"--recipe {options.recipe}: moe.type={config.moe.type}; the benchmark is of diffmoe"
        )
    changes = {"training.accumulation": 1, "parallel.expert_parallel": 1, "data.lanes": LANES}
    config = config.replace(changes)
    # Logging keeps its rhythm in steps, whatever the batch is here.
    steps = max(1, config.logging.log_samples // config.training.batch_size)
    return config.replace(
        {"training.batch_size": options.batch, "logging.log_samples": steps * options.batch}
    )


def check_outputs(options: argparse.Namespace) -> None:
    """Raise UserError for what could not be written after minutes of measuring."""
    from diffmoe.benchmarks.report import read_aims
    from diffmoe.work import ensure_writable

    plot = getattr(options, "plot", None)
    if plot is not None:
        if not options.growth:
            raise UserError(f"--plot {plot} draws --growth; give both")
        if plot.suffix != ".png":
            raise UserError(f"--plot {plot}: the name must end in .png")
        if find_spec("matplotlib") is None:
            raise UserError('--plot needs matplotlib: pip install -e ".[eval]"')
    if options.expect is not None:
        read_aims(options.expect)
    trace = getattr(options, "trace", None)
    if trace is not None and getattr(options, "growth", False):
        raise UserError(f"--trace {trace} draws the layer, not --growth; give one of them")
    for file in (plot, options.json, trace):
        if file is not None:
            ensure_writable(file.parent)


def measure_reading(options: argparse.Namespace, report: Report) -> None:
    from diffmoe.benchmarks.reading import reading_speeds, waiting_share, write_moments

    for flips in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            manifest = write_moments(directory, 8, options.samples // 8, flips)
            mirrored = "with" if flips else "without"
            speeds = reading_speeds(directory, manifest, options.workers, options.rounds)
            for name, speed in speeds.items():
                label = f"{mirrored} mirrored moments: {name} (ratio: to the bare loop)"
                report.add(label, speed, "samples/s", speed / speeds["bare loop"])
            share = waiting_share(directory, manifest, options.rate, max(1, *options.workers))
            report.add(
                f"{mirrored} mirrored moments: a loop of {options.rate:g}/s waits", share, ""
            )


def tell(options: argparse.Namespace, report: Report) -> None:
    try:
        if options.expect:
            report.expect(options.expect)
    finally:  # what was measured is told even if an aim has a wrong name
        print(report.table())
        if options.json:
            report.write(options.json)


def main() -> None:
    options = parse()
    import torch

    from diffmoe.benchmarks.expert_parallel import WORLD, benchmark_expert_parallel
    from diffmoe.benchmarks.growth import benchmark_growth, draw
    from diffmoe.benchmarks.layer import benchmark_layer
    from diffmoe.benchmarks.ranks import alone, device_of_ranks
    from diffmoe.benchmarks.report import Report
    from diffmoe.benchmarks.sampling import benchmark_sampling
    from diffmoe.benchmarks.steps import benchmark_steps
    from diffmoe.benchmarks.training import benchmark_training
    from diffmoe.parallel.device import (
        default_device,
        setup_device,
        use_deterministic_algorithms,
    )

    check_outputs(options)
    if options.part == "ep":
        options.device = device_of_ranks(WORLD)
    elif options.part != "data":
        options.device = options.device or default_device()  # the report names it
    threads = 1 if options.part in ("data", "ep") else options.threads or os.cpu_count()
    torch.set_num_threads(threads)
    told = {
        key: value
        for key, value in vars(options).items()
        if key not in ("json", "plot", "threads", "expect", "trace")
    }
    report = Report(f"benchmark {options.part}", told)
    if options.part == "data":
        measure_reading(options, report)
    elif options.part == "ep":
        benchmark_expert_parallel(read_config(options), options.rounds, report)
    else:
        config, device = read_config(options), setup_device(options.device)
        if config.training.deterministic:
            use_deterministic_algorithms()
        if options.part == "sample":
            benchmark_sampling(config, options.steps, options.rounds, device, report, options.trace)
        elif options.part == "train":
            with alone(device):
                benchmark_training(config, options.rounds, device, report)
        elif options.part == "step":
            with alone(device):
                benchmark_steps(config, options.rounds, device, report, options.trace)
        elif options.growth:
            benchmark_growth(config, options.largest, options.rounds, device, report)
        else:
            with alone(device):
                benchmark_layer(config, options.rounds, device, report, options.trace)
                benchmark_layer(config.replace(NARROW), options.rounds, device, report)
    tell(options, report)
    if getattr(options, "plot", None):
        draw(report.points, options.plot)


if __name__ == "__main__":
    run_command(main)
