"""Publish an exported model on the Hugging Face hub.

  python tools/convert_checkpoint.py runs/mnist exported/mnist
  python tools/publish.py exported/mnist OWNER/NAME --license mit --dry-run   # what would be there
  python tools/publish.py exported/mnist OWNER/NAME --license mit

FOLDER is verified first. All its files are uploaded in one commit, the model card with the license
and the lines that load it: diffmoe.Pipeline.from_pretrained("OWNER/NAME"). The token is that of
`hf auth login`, or HF_TOKEN.
"""

import argparse
from pathlib import Path

from diffmoe.errors import run_command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="an exported model")
    parser.add_argument("name", metavar="OWNER/NAME", help="of the repository; made if need be")
    parser.add_argument("--license", help="such as mit; default: the one in the card")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--dry-run", action="store_true", help="show it, upload nothing")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from diffmoe.export.hub import prepare, publish

    if options.dry_run:
        made = prepare(options.folder, options.name, options.license)
        print(made.card)
        for file, size in made.files.items():
            print(f"{size / 1e6:12.3f} MB  {file}")
        print(f"{sum(made.files.values()) / 1e6:12.3f} MB in all, to {options.name}; not uploaded")
        return
    print(publish(options.folder, options.name, options.license, options.private))


if __name__ == "__main__":
    run_command(main)
