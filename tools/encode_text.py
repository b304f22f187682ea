"""Add the features of a text encoder to shards whose samples carry captions (`txt`, one a line).

  python tools/encode_text.py data/photos data/photos-t5 --encoder models/flan-t5-base --length 64
  python tools/encode_text.py data/photos data/photos-bytes --encoder bytes --length 200

FOLDER holds a T5 or a CLIP of transformers with its tokenizer; nothing is downloaded. Of T5 the
encoder's tokens are kept, of CLIP those of its text model and the pooled vector. With `bytes` the
model reads the captions itself and no features are stored. The manifest then names the encoder by
its weights, so that a model refuses the features of another one.

Stopped at any moment, the same command goes on: finished shards are kept. Several ranks share the
work under torchrun or srun, each with shards of its own.
"""

import argparse
import sys

from diffmoe.cli import add_device, positive
from diffmoe.config import BYTES
from diffmoe.data.captions import CAPTION_BYTES
from diffmoe.errors import run_command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="SHARDS", help="the data folder to read")
    parser.add_argument("out", metavar="OUT", help="the data folder to write")
    parser.add_argument("--encoder", required=True, metavar="FOLDER|bytes")
    parser.add_argument(
        "--length",
        type=positive,
        metavar="L",
        help=f"tokens of a caption at most; default {CAPTION_BYTES} bytes, 128 of T5, CLIP's own",
    )
    parser.add_argument("--batch", type=positive, default=64, help="captions a pass; default 64")
    add_device(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what OUT holds")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from diffmoe.parallel.device import setup_device
    from diffmoe.prepare.text_features import encode_text
    from diffmoe.text.encoders import ByteEncoder, TransformersEncoder
    from diffmoe.work import Ranks

    ranks = Ranks.of_environment()
    if options.encoder == BYTES:
        encoder = ByteEncoder(options.length or CAPTION_BYTES)
    else:
        device = setup_device(options.device)
        encoder = TransformersEncoder(options.encoder, options.length, device)
    manifest = encode_text(
        options.data,
        options.out,
        encoder,
        batch=options.batch,
        overwrite=options.overwrite,
        ranks=ranks,
    )
    if manifest is None:
        print(f"rank {ranks.rank} of {ranks.world} is done; others still work", file=sys.stderr)
        return
    print(manifest.summary(options.out))
    print(f"a model of it wants {manifest.text.override()}")


if __name__ == "__main__":
    run_command(main)
