"""Add the features of a text encoder to shards with captions (members `txt`, one per line).

  python tools/encode_text.py data/photos data/photos-t5 --encoder models/flan-t5-base --length 64
  python tools/encode_text.py data/photos data/photos-bytes --encoder bytes --length 200

FOLDER is a T5 or CLIP in transformers' format with its tokenizer; nothing is downloaded. For T5 the
encoder's token features are stored, for CLIP those of its text model and the pooled vector. With
`bytes` the model reads the captions itself and no features are stored. The manifest records a
checksum of the encoder's weights, so that a model refuses the features of another encoder.

The command can be interrupted at any time; running it again resumes after the finished shards.
Under torchrun or srun several ranks share the work, each making shards of its own.
"""

import argparse

from diffmoe.cli import add_device, positive
from diffmoe.config import BYTES
from diffmoe.data.manifest import CAPTION_BYTES
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
        help=f"most tokens per caption; default {CAPTION_BYTES} bytes, 128 (T5), CLIP's own",
    )
    parser.add_argument("--batch", type=positive, default=64, help="captions per pass; default 64")
    add_device(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the contents of OUT")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from diffmoe.parallel.device import setup_device
    from diffmoe.prepare.sharding import ShardOutput
    from diffmoe.prepare.text_features import encode_text
    from diffmoe.text.encoders import ByteTokenizer, TransformersEncoder
    from diffmoe.work import Ranks

    output = ShardOutput(options.out, overwrite=options.overwrite, ranks=Ranks.of_environment())
    if options.encoder == BYTES:
        encoder = ByteTokenizer(options.length or CAPTION_BYTES)
    else:
        device = setup_device(options.device)
        encoder = TransformersEncoder(options.encoder, options.length, device)
    manifest = encode_text(options.data, output, encoder, batch=options.batch)
    print(output.summary(manifest))
    if manifest is not None:
        print(f"to train on it: {encoder.content.override()}")


if __name__ == "__main__":
    run_command(main)
