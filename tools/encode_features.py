"""Add a frozen image encoder's features to shards, for representation alignment (align.block).

  python tools/encode_features.py data/photos data/photos-lite0 --encoder efficientnet_lite0@224
  python tools/encode_features.py data/imagenet256 data/dinov2 --encoder models/dinov2-base@224

An encoder is efficientnet_lite0, the FOLDER of a vision model of transformers (DINOv2, SigLIP and
the like), a TorchScript FILE.pt that takes float images (n, 3, H, W) in 0..255 and gives (n,
channels, rows, columns), or package.module:function that does so; @SIZE resizes images first.
Nothing is downloaded. Images are what the data's autoencoder decodes. The features are stored in
float16 beside each sample, where data is mirrored in training those of the mirror image, too. The
manifest names encoder, layer and grid.

The command can be interrupted at any time; running it again resumes after the finished shards.
Under torchrun or srun several ranks share the work, each making shards of its own.
"""

import argparse

from diffmoe.cli import add_device, positive
from diffmoe.errors import run_command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="SHARDS", help="the data folder to read")
    parser.add_argument("out", metavar="OUT", help="the data folder to write")
    parser.add_argument("--encoder", required=True, metavar="NAME|FOLDER|FILE|FUNCTION[@SIZE]")
    parser.add_argument(
        "--layer",
        type=int,
        metavar="N",
        help="block of efficientnet_lite0 (default 11 of 16: stride 16, 112 channels), or hidden "
        "state of a folder's model (default: the last, after its norm)",
    )
    parser.add_argument("--batch", type=positive, default=64, help="images per pass; default 64")
    add_device(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the contents of OUT")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from diffmoe.evaluation.patch_features import load_patch_encoder
    from diffmoe.parallel.device import setup_device
    from diffmoe.prepare.image_features import encode_features
    from diffmoe.prepare.sharding import ShardOutput
    from diffmoe.work import Ranks

    output = ShardOutput(options.out, overwrite=options.overwrite, ranks=Ranks.of_environment())
    device = setup_device(options.device)
    encoder = load_patch_encoder(options.encoder, options.layer, device)
    manifest = encode_features(options.data, output, encoder, batch=options.batch, device=device)
    print(output.summary(manifest))
    if manifest is not None and manifest.features is not None:
        channels, rows, columns = manifest.features.shape
        print(f"features of {encoder.name}, {encoder.layer}: {channels} on {rows}x{columns}")
        print(f"to align with them: align.block=BLOCK align.width={channels}")


if __name__ == "__main__":
    run_command(main)
