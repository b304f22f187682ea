"""Check a data folder before training on it. The exit code is 0 if it is fine, 1 if not.

  python tools/check_data.py data/imagenet256
  python tools/check_data.py data/imagenet256 --reshard 256 --out data/imagenet256-256

Reads every shard and checks counts, checksums, shapes, types, finite numbers, labels and duplicate
keys; prints the class histogram and each channel's mean and standard deviation as the model would
see them. A standard deviation far from 1 indicates a wrong scale. Images of a single color, and
those that are almost entirely black or white, are counted: more than 1 % are a problem. One sample
of each class (at most 32) is decoded onto a contact sheet, above its mirror image: look at it.

--reshard N writes the same samples into N equal shards, for example if a run has more lanes than
there are shards. It can be interrupted; running the command again resumes.
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
    parser.add_argument("--out", metavar="DIR", help="the folder that --reshard writes")
    parser.add_argument("--overwrite", action="store_true", help="replace the contents of --out")
    add_allow_commands(parser)
    options = parser.parse_args()
    if (options.reshard is None) != (options.out is None):
        parser.error("--reshard N and --out DIR must be given together")
    return options


def main() -> None:
    options = parse()
    from diffmoe.data.fetching import Fetch
    from diffmoe.parallel.device import setup_device
    from diffmoe.prepare.checking import check_data
    from diffmoe.prepare.resharding import reshard
    from diffmoe.prepare.sharding import ShardOutput
    from diffmoe.work import Ranks

    if options.reshard is not None:
        ranks = Ranks.of_environment()
        output = ShardOutput(options.out, options.reshard, overwrite=options.overwrite, ranks=ranks)
        print(output.summary(reshard(options.data, output)))
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
