"""Turn a folder of images into a data folder for training: shards of latents and manifest.json.

  python tools/encode_latents.py --images imagenet/train --vae stabilityai/sd-vae-ft-mse \\
      --out data/imagenet256
  python tools/encode_latents.py --images photos --pixels --size 32 --out data/photos

--images is a folder of class folders (CLASS/NAME.jpg, classes numbered by sorted name), of images
alone, which are one class, or of tar shards (KEY.jpg with KEY.cls; give --classes), which may be
compressed (.tar.gz, .tar.bz2, .tar.xz, .tar.zst). Or it is a data set of Hugging Face on disk, as
save_to_disk leaves it or as the parquet files of a repository; --columns names those that are not
plain, such as label=fine_label, and label= says that all images are of one class. Such a data set
and .tar.zst need pip install "diffmoe[arrow]"; both, and compressed tars, need room for the files,
unpacked, in --out until the work is done.

Each image is cropped as in DiT, encoded, and stored as the mean and log-variance of its posterior,
together with those of the mirrored image; training draws from them. With --pixels the image's bytes
are stored once; training mirrors half of them.

With --captions, the folder holds NAME.jpg with NAME.txt, one caption per line, at any depth, or
tars of KEY.jpg with KEY.txt. A mirrored image keeps its captions: if they mention left or right,
give --no-flips. tools/encode_text.py then adds the features of a text encoder.

The command can be interrupted at any time; running it again resumes after the finished shards.
Under torchrun or srun several ranks share the work, each making shards of its own. With 8 GPUs:

  torchrun --nproc_per_node 8 tools/encode_latents.py --images ... --vae ... --out ...

Images are decoded as viewers show them: rotated as EXIF says, transparency on --background, 16-bit
and float grays scaled, CMYK and palettes converted, the first frame of an animation. HEIC needs
pip install "diffmoe[heic]". Color profiles are not applied. Unreadable and ambiguous images (floats
beyond 0..1, integers beyond 65535) are skipped and listed in manifest.json; more than --max-bad of
them stop the work. Links that lead out of the folder need --follow-links. Check the result with
tools/check_data.py.
"""

import argparse

from diffmoe.cli import add_device
from diffmoe.errors import run_command


def image_size(text: str) -> int | tuple[int, int]:
    """N, or HEIGHTxWIDTH."""
    try:
        height, *width = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor HEIGHTxWIDTH") from None
    if len(width) > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither N nor HEIGHTxWIDTH")
    return (height, width[0]) if width else height


def column(text: str) -> tuple[str, str]:
    """KIND=NAME."""
    kind, equals, name = text.partition("=")
    if kind not in ("image", "label", "text") or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not image=, label= or text= and a name")
    return kind, name


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="see above")
    parser.add_argument("--out", required=True, metavar="DIR", help="the data folder to write")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument(
        "--vae", metavar="PATH_OR_ID", help="folder or hub id of an autoencoder of diffusers"
    )
    kind.add_argument("--pixels", action="store_true", help="store pixels, no autoencoder")
    parser.add_argument(
        "--size",
        type=image_size,
        default=256,
        metavar="N|HxW",
        help="of the crop in pixels: a square, or height x width, such as 256x384; default 256",
    )
    parser.add_argument(
        "--shards",
        type=int,
        metavar="N",
        help="tar files; default one per 1,000 images, at least 32 (a run needs one per lane)",
    )
    parser.add_argument(
        "--classes", type=int, metavar="N", help="number of classes, where they have no names"
    )
    parser.add_argument("--split", metavar="NAME", help="of a data set of Hugging Face: train, ...")
    parser.add_argument(
        "--columns",
        nargs="+",
        type=column,
        default=[],
        metavar="KIND=NAME",
        help="of a data set of Hugging Face: image, label, and with --captions text",
    )
    parser.add_argument(
        "--captions", action="store_true", help="images have captions, NAME.txt, instead of classes"
    )
    parser.add_argument(
        "--dtype",
        choices=["uint8", "float16", "bfloat16", "float32"],
        help="of the stored numbers; default uint8 for --pixels, else float16",
    )
    parser.add_argument(
        "--background",
        default="white",
        metavar="COLOR",
        help="behind transparent images; default white",
    )
    parser.add_argument(
        "--follow-links",
        action="store_true",
        help="also follow links out of the folder; only for links that you made yourself",
    )
    parser.add_argument("--no-flips", action="store_true", help="never mirror images")
    parser.add_argument("--batch", type=int, default=32, help="images per pass; default 32")
    parser.add_argument("--workers", type=int, default=4, help="decoding threads; default 4")
    parser.add_argument(
        "--max-bad",
        type=int,
        default=10,
        metavar="N",
        help="images that may fail; default 10",
    )
    add_device(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the contents of --out")
    return parser.parse_args()


def main() -> None:
    options = parse()
    from diffmoe.parallel.device import setup_device
    from diffmoe.prepare.encoding import Encoding, encode_images
    from diffmoe.prepare.image_folders import ImageSource
    from diffmoe.prepare.images import parse_color
    from diffmoe.prepare.next_step import training_command
    from diffmoe.prepare.sharding import ShardOutput
    from diffmoe.work import Ranks

    output = ShardOutput(
        options.out, options.shards, options.max_bad, options.overwrite, Ranks.of_environment()
    )
    manifest = encode_images(
        ImageSource(
            options.images,
            classes=options.classes,
            captioned=options.captions,
            background=parse_color(options.background),
            follow_links=options.follow_links,
            split=options.split,
            columns=dict(options.columns),
        ),
        Encoding(options.size, options.vae, options.dtype, flips=not options.no_flips),
        output,
        batch=options.batch,
        workers=options.workers,
        device=setup_device(options.device),
        report=print,
    )
    print(output.summary(manifest))
    if manifest is not None:
        print(f"next: {training_command(manifest, options.out)}")


if __name__ == "__main__":
    run_command(main)
