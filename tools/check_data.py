"""Check a data folder before training on it. The exit code is 0 if it is fine, 1 if not.

  python tools/check_data.py data/imagenet256
  python tools/check_data.py data/imagenet256 --reshard 256 --out data/imagenet256-256
  python tools/check_data.py data/photos --hold-out 1000 data/held-out --out data/train

Reads every shard and checks counts, checksums, shapes, types, finite numbers, labels and duplicate
keys; prints the class histogram and each channel's mean and standard deviation as the model would
see them. A standard deviation far from 1 indicates a wrong scale. Images of a single color, and
those that are almost entirely black or white, are counted: more than 1 % are a problem. One sample
of each class (at most 32) is decoded onto a contact sheet, above its mirror image: look at it.

--reshard N writes the same samples into N equal shards, for example if a run has more lanes than
there are shards. --hold-out N DIR writes N samples, chosen by the hash of their keys, into DIR, and
all others into --out: train on data.path=OUT with validation.path=DIR. Either can be interrupted;
running the command again resumes.
"""

import argparse
import sys
from pathlib import Path

from diffmoe.cli import add_allow_commands, add_device
from diffmoe.errors import UserError, run_command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DIR", help="the data folder")
    parser.add_argument(
        "--sheet", metavar="PNG", help="contact sheet; default DIR/contact_sheet.png"
    )
    parser.add_argument("--no-sheet", action="store_true", help="write no contact sheet")
    add_device(parser)
    parser.add_argument("--reshard", type=int, metavar="N", help="rewrite into N shards, in --out")
    parser.add_argument(
        "--hold-out",
        nargs=2,
        metavar=("N", "DIR"),
        help="N samples into DIR, the rest into --out",
    )
    parser.add_argument("--out", metavar="DIR", help="the folder to rewrite into")
    parser.add_argument("--overwrite", action="store_true", help="replace the contents of --out")
    add_allow_commands(parser)
    options = parser.parse_args()
    rewrites = options.reshard is not None or options.hold_out is not None
    if rewrites != (options.out is not None):
        parser.error("--out DIR belongs to --reshard N or --hold-out N DIR, which need it")
    if options.hold_out is not None:
        samples, folder = options.hold_out
        if not samples.isdecimal():
            parser.error(f"--hold-out {samples} {folder}: give a number of samples, then a folder")
        options.hold_out = int(samples), folder
    return options


def main() -> None:
    options = parse()
    from diffmoe.data.fetching import Fetch
    from diffmoe.parallel.device import setup_device
    from diffmoe.prepare.checking import check_data
    from diffmoe.prepare.resharding import hold_out, reshard
    from diffmoe.prepare.sharding import ShardOutput
    from diffmoe.work import Ranks

    if options.out is not None:
        ranks = Ranks.of_environment()
        output = ShardOutput(options.out, options.reshard, overwrite=options.overwrite, ranks=ranks)
        if options.hold_out is None:
            print(output.summary(reshard(options.data, output)))
            return
        samples, folder = options.hold_out
        held_out = ShardOutput(folder, overwrite=options.overwrite, ranks=ranks)
        train, held = hold_out(options.data, samples, output, held_out)
        print(output.summary(train), held_out.summary(held), sep="\n")
        return
    sheet = options.sheet or Path(options.data) / "contact_sheet.png"
    device = setup_device(options.device)
    try:
        report = check_data(
            options.data,
            None if options.no_sheet else sheet,
            device,
            Fetch(allow_commands=options.allow_commands),
        )
    except UserError as error:
        print(f"problem: {error}")
        sys.exit(1)
    print(report)
    sys.exit(1 if report.problems else 0)


if __name__ == "__main__":
    run_command(main)
