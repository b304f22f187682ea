"""Measure parts of the system on this machine.

  python tools/benchmark.py data

data: how fast moments of 4x32x32 latents come from warm files, beside a bare tarfile + np.load loop
and webdataset's own pipeline over the same shards; and how long a training loop that does --rate
samples a second would wait for them. Compare figures of one run only.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from diffmoe.data.speed import reading_speeds, waiting_share, write_moments
from diffmoe.errors import run_command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["data"])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3, help="the best counts; default 3")
    parser.add_argument("--samples", type=int, default=4000, help="in the shards; default 4000")
    parser.add_argument("--rate", type=float, default=5000, help="samples/s; default 5000")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)  # per core
    for flips in (True, False):
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder)
            manifest = write_moments(directory, 8, options.samples // 8, flips)
            print(f"{'with' if flips else 'without'} mirrored moments:")
            speeds = reading_speeds(directory, manifest, options.workers, options.rounds)
            for name, speed in speeds.items():
                share = speed / speeds["bare loop"]
                print(f"  {name:12} {speed:8.0f} samples/s, {share:5.2f} of the bare loop")
            workers = max(1, *options.workers)
            share = waiting_share(directory, manifest, options.rate, workers)
            print(f"  a loop of {options.rate:g} samples/s waits {share:.2%} of its time")


if __name__ == "__main__":
    run_command(main)
