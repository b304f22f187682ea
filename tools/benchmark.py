"""Measure parts of the system on this machine. Compare figures of one run only.

  python tools/benchmark.py train --recipe diffmoe_s_e16_flow --json step.json
  python tools/benchmark.py layer [--growth [--plot growth.png]]
  python tools/benchmark.py sample | ep | data

train: whole steps through the engine beside the dense model of equal activated size; by part.
layer: one MoE layer beside a plain loop over experts, DeepSpeed's MoE and a dense MLP; or
--growth: its time and memory against experts, tokens and width.
sample: images at half the capacity beside the full one.
ep: experts shared by two ranks beside none shared, collectives counted, wide pools.
data: how fast moments of 4x32x32 latents come from warm files, beside a bare tarfile + np.load loop
and webdataset's own pipeline; and how long a loop that does --rate samples a second would wait.

What is compared takes turns: figures are medians over rounds, ratios medians of rounds' ratios.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch

from diffmoe.arguments import positive
from diffmoe.benchmarks.expert_parallel import benchmark_expert_parallel
from diffmoe.benchmarks.growth import benchmark_growth, draw
from diffmoe.benchmarks.layer import benchmark_layer
from diffmoe.benchmarks.ranks import alone
from diffmoe.benchmarks.report import Report
from diffmoe.benchmarks.sampling import benchmark_sampling
from diffmoe.benchmarks.training import benchmark_training
from diffmoe.config import Config
from diffmoe.data.speed import LANES, reading_speeds, waiting_share, write_moments
from diffmoe.errors import UserError, run_command
from diffmoe.parallel.device import default_device, own_device
from diffmoe.recipes import load_config

NARROW = {"moe.experts": 64, "moe.expert_ratio": 0.5}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("train", "layer", "sample", "ep"):
        part = parts.add_parser(name)
        part.add_argument("--recipe", default="diffmoe_s_e16_flow", help="name or YAML")
        part.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
        part.add_argument("--batch", type=positive, default=8, help="images of a step; default 8")
        part.add_argument("--rounds", type=positive, default=5)
        part.add_argument("--device", default=default_device())
        part.add_argument("--threads", type=positive, default=os.cpu_count(), help="ep: one a rank")
    parts.choices["layer"].add_argument("--growth", action="store_true")
    parts.choices["layer"].add_argument("--largest", type=positive, default=16384, help="S")
    parts.choices["layer"].add_argument("--plot", metavar="PNG", help="of --growth")
    parts.choices["sample"].add_argument("--steps", type=positive, default=4)
    data = parts.add_parser("data")
    data.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    data.add_argument("--rounds", type=positive, default=3, help="the best counts; default 3")
    data.add_argument("--samples", type=positive, default=4000, help="in the shards; default 4000")
    data.add_argument("--rate", type=float, default=5000, help="samples/s; default 5000")
    for part in parts.choices.values():
        part.add_argument("--json", type=Path, metavar="OUT")
    return parser.parse_args()


def read_config(options: argparse.Namespace) -> Config:
    if options.batch % LANES:
        raise UserError(f"--batch {options.batch} must be a multiple of {LANES} (lanes of data)")
    if load_config(options.recipe, options.overrides).model.text is not None:
        raise UserError(f"--recipe {options.recipe}: the benchmark's data has classes, no captions")
    changes = {"training.accumulation": 1, "parallel.expert_parallel": 1, "data.lanes": LANES}
    config = load_config(options.recipe, options.overrides).replace(changes)
    # Logging keeps its rhythm in steps, whatever the batch is here.
    steps = max(1, config.logging.log_samples // config.training.batch_size)
    return config.replace(
        {"training.batch_size": options.batch, "logging.log_samples": steps * options.batch}
    )


def measure_reading(options: argparse.Namespace, report: Report) -> None:
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


def main() -> None:
    options = parse()
    torch.set_num_threads(1 if options.part in ("data", "ep") else options.threads)
    told = {key: value for key, value in vars(options).items() if key not in ("json", "threads")}
    report = Report(f"benchmark {options.part}", told)
    if options.part == "data":
        measure_reading(options, report)
    elif options.part == "ep":
        benchmark_expert_parallel(read_config(options), options.rounds, report)
    else:
        config, device = read_config(options), own_device(options.device)
        if options.part == "sample":
            benchmark_sampling(config, options.steps, options.rounds, device, report)
        elif options.part == "train":
            with alone(device):
                benchmark_training(config, options.rounds, device, report)
        elif options.growth:
            benchmark_growth(config, options.largest, options.rounds, device, report)
            if options.plot:
                draw(report.points, options.plot)
        else:
            with alone(device):
                benchmark_layer(config, options.rounds, device, report)
                benchmark_layer(config.replace(NARROW), options.rounds, device, report)
    print(report.table())
    if options.json:
        report.write(options.json)


if __name__ == "__main__":
    run_command(main)
