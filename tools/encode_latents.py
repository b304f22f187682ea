"""Turn a folder of images into a data folder for training: shards of latents and manifest.json.

  python tools/encode_latents.py --images imagenet/train --vae stabilityai/sd-vae-ft-mse \\
      --out data/imagenet256
  python tools/encode_latents.py --images photos --pixels --size 32 --out data/photos

IMAGES are class folders (CLASS/NAME.jpg, classes numbered by sorted name) or tar shards (KEY.jpg
with KEY.cls; give --classes). Each is cropped as DiT does it, encoded, and stored as the mean and
log-variance of its posterior, together with those of the mirrored image; training draws from them.
With --pixels the bytes of the image are stored, once; training mirrors half of what it reads.

With --captions, IMAGES are NAME.jpg with NAME.txt, one caption a line, in any folders, or tars of
KEY.jpg with KEY.txt. A mirrored image keeps its captions: where they tell left from right, give
--no-flips. tools/encode_text.py then adds the features of a text encoder.

Stopped at any moment, the same command goes on: finished shards are kept. Several ranks share the
work under torchrun or srun, each with shards of its own, for example with 8 GPUs:

  torchrun --nproc_per_node 8 tools/encode_latents.py --images ... --vae ... --out ...

Images are read as people see them: turned as their EXIF says, transparency on --background, gray
values of 16 bits and floats scaled, CMYK and palettes converted, the first frame of an animation.
Color profiles are not applied. What cannot be read, or may mean anything (floats beyond 0..1,
integers beyond 65535), is skipped and listed in manifest.json; more than --max-bad stop the work.
Links that lead out of IMAGES need --follow-links. tools/check_data.py looks the result over.
"""

import argparse
import sys

from diffmoe.cli import add_device
from diffmoe.errors import run_command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="class folders or tars")
    parser.add_argument("--out", required=True, metavar="DIR", help="the data folder to write")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--vae", metavar="PATH_OR_ID", help="diffusers AutoencoderKL: folder or hub")
    kind.add_argument("--pixels", action="store_true", help="no autoencoder: pack the pixels")
    parser.add_argument("--size", type=int, default=256, help="side of the square; default 256")
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="tar files; default one per 1,000 images, at least 32 (a run needs one per lane)",
    )
    parser.add_argument("--classes", type=int, metavar="N", help="number of classes, for tars")
    parser.add_argument(
        "--captions", action="store_true", help="images have captions, NAME.txt, and no classes"
    )
    parser.add_argument(
        "--dtype",
        choices=["uint8", "float16", "bfloat16", "float32"],
        help="of the numbers in the files; default uint8 of --pixels, else float16",
    )
    parser.add_argument(
        "--background",
        default="white",
        metavar="COLOR",
        help="of transparent images; default white",
    )
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="also those that lead out of IMAGES: only where they are of your own making",
    )
    parser.add_argument("--no-flips", action="store_true", help="never mirror images")
    parser.add_argument("--batch", type=int, default=32, help="images per pass; default 32")
    parser.add_argument("--workers", type=int, default=4, help="decoding threads; default 4")
    parser.add_argument(
        "--max-bad", type=int, default=10, metavar="N", help="images that may fail; default 10"
    )
    add_device(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace what DIR holds")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from diffmoe.parallel.device import setup_device
    from diffmoe.prepare.decoding import color
    from diffmoe.prepare.encoding import encode_images
    from diffmoe.work import Ranks

    ranks = Ranks.of_environment()
    manifest = encode_images(
        options.images,
        options.out,
        vae=None if options.pixels else options.vae,
        size=options.size,
        shards=options.shards,
        batch=options.batch,
        workers=options.workers,
        dtype=options.dtype,
        flips=not options.no_flips,
        classes=options.classes,
        captions=options.captions,
        background=color(options.background),
        follow_links=options.follow_links,
        max_bad=options.max_bad,
        overwrite=options.overwrite,
        device=setup_device(options.device),
        ranks=ranks,
    )
    if manifest is None:
        print(f"rank {ranks.rank} of {ranks.world} is done; others still work", file=sys.stderr)
        return
    print(manifest.summary(options.out))


if __name__ == "__main__":
    run_command(main)
