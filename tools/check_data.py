"""Look a data folder over before a run trusts it; exit code 0 if all is well, 1 if not.

  python tools/check_data.py data/imagenet256
  python tools/check_data.py data/imagenet256 --reshard 256 --out data/imagenet256-256

Reads every shard: counts, checksums, shapes, types, finite numbers, labels, keys that come twice;
prints the class histogram and each channel's mean and standard deviation as the model would see
them. A standard deviation far from 1 is the sign of a wrong scale. Images of one color, and those
that are nearly all black or white, are counted: more than 1 % are a problem. One sample of each
class (32 at most) is decoded onto a contact sheet, above its mirror image: look at it.

--reshard N writes the same samples into N equal shards, for example when a run has more lanes than
there are shards. Stopped at any moment, the same command goes on.
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
        "--sheet", metavar="PNG", help="the contact sheet; default DIR/contact_sheet.png"
    )
    parser.add_argument("--no-sheet", action="store_true", help="decode nothing")
    add_device(parser)
    parser.add_argument("--reshard", type=int, metavar="N", help="rewrite into N shards, in --out")
    parser.add_argument("--out", metavar="DIR", help="the new folder of --reshard")
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    add_allow_commands(parser)
    options = parser.parse_args()
    if (options.reshard is None) != (options.out is None):
        parser.error("--reshard N and --out DIR belong together")
    return options


def main() -> None:
    options = parse()
    from diffmoe.data.fetching import Fetch
    from diffmoe.parallel.device import setup_device
    from diffmoe.prepare.checking import check_data
    from diffmoe.prepare.resharding import reshard
    from diffmoe.work import Ranks

    if options.reshard is not None:
        manifest = reshard(
            options.data,
            options.out,
            options.reshard,
            overwrite=options.overwrite,
            ranks=Ranks.of_environment(),
        )
        if manifest is not None:
            print(manifest.summary(options.out))
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
