"""Convert models: checkpoints and other projects' weights to a folder for inference, and back.

  python tools/convert_checkpoint.py runs/mnist exported/mnist      the newest checkpoint's EMA
  python tools/convert_checkpoint.py runs/mnist exported/avg --weights ema:0.10 --dtype bfloat16
  python tools/convert_checkpoint.py release.pt exported/release --objective flow
  python tools/convert_checkpoint.py exported/release release2.pt --to release
  python tools/convert_checkpoint.py exported/dense exported/moe --upcycle --experts 8
  python tools/convert_checkpoint.py info exported/mnist            what any such path is

FROM is a run's folder, a checkpoint step-XXXXXXXX or ema-XXXXXXXX of any number of ranks, an
exported folder, a .pt file of the DiffMoE release, DiT or SiT, or a folder of diffusers'
DiTTransformer2DModel or of a pipeline with one (its vae/ and scheduler are used). TO must not
exist; it appears when it is whole, and has been held against FROM. No GPU, no process group, one
tensor at a time. diffmoe.load(TO) and diffmoe.Pipeline(TO) take the result.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.errors import UserError, run_command
from diffmoe.redaction import printable

if TYPE_CHECKING:
    from diffmoe.export.sources import Source

FORMATS = ("release", "dit", "sit", "diffusers")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="FROM", type=Path)
    parser.add_argument("target", metavar="TO", type=Path)
    parser.add_argument(
        "--weights",
        default="ema",
        help="ema (default), live, or of a run with training.ema_stds ema:STD, such as ema:0.10; "
        "of a .pt file its entry `ema` or `model`",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="default float32"
    )
    parser.add_argument(
        "--to",
        choices=["diffmoe", *FORMATS],
        default="diffmoe",
        help="format of TO; default diffmoe, the folder for inference",
    )
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="per file; default 5")
    parser.add_argument(
        "--capacity",
        type=float,
        metavar="C",
        help="of training, of a .pt file (default 1) or to train an upcycled model with",
    )
    more = parser.add_argument_group("more experts; train on with training.init=TO")
    how = more.add_mutually_exclusive_group()
    how.add_argument(
        "--upcycle",
        choices=["shared", "copies"],
        nargs="?",
        const="shared",
        help="a dense model to a DiffMoE with the same output. shared (default): beside its MLP, "
        "exact at any capacity; copies: E of them, exact at capacity E",
    )
    how.add_argument(
        "--grow", action="store_true", help="a multiple of the experts, the same output"
    )
    more.add_argument("--experts", type=int, metavar="E", help="how many there will be")
    more.add_argument("--every-block", action="store_true", help="default: every second one")
    more.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="on new experts, in their deviations; default 0",
    )
    more.add_argument("--seed", type=int, default=0, help="of noise and new routers; default 0")
    foreign = parser.add_argument_group("what other projects' files do not say")
    foreign.add_argument("--format", choices=FORMATS, help="of FROM; default detected, and said")
    foreign.add_argument("--objective", choices=["flow", "ddpm"])
    foreign.add_argument("--heads", type=int, help="default: those of the published widths")
    foreign.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="without the null one; default as the file says, or 1000 of 1001 rows of labels",
    )
    foreign.add_argument("--input-size", type=int, help="default: from pos_embed")
    foreign.add_argument("--top-k", type=int, default=1, help="of token choice; default 1")
    foreign.add_argument(
        "--vae",
        help="a hub id or a folder, which comes along; default a pipeline's own vae/, else "
        "stabilityai/sd-vae-ft-ema",
    )
    foreign.add_argument(
        "--scale",
        type=float,
        help="of its latents; default as the folder of --vae says, else 0.18215",
    )
    return parser.parse_args()


def with_experts(source: Source, options: argparse.Namespace) -> Source:
    """What --upcycle or --grow make of it."""
    from diffmoe.conversion.upcycling import grow, upcycle

    if options.upcycle is None and not options.grow:
        if options.experts is not None or options.every_block or options.noise:
            raise UserError("--experts, --every-block and --noise belong to --upcycle or --grow")
        return source
    if options.experts is None:
        raise UserError("--upcycle and --grow need --experts E")
    if options.grow:
        return grow(source, options.experts, options.noise, options.seed)
    return upcycle(
        source,
        options.experts,
        options.every_block,
        options.upcycle,
        options.capacity,
        options.noise,
        options.seed,
    )


def tell(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(printable(note), file=sys.stderr)


def show(path: Path) -> None:
    from diffmoe.conversion.info import info

    lines = info(path)
    width = max(map(len, lines))
    for key, value in lines.items():
        print(f"{key:{width}}  {printable(value)}")


def main() -> None:
    if sys.argv[1:2] == ["info"]:
        parser = argparse.ArgumentParser(
            prog="convert_checkpoint.py info",
            description="what a model or its file is, by its path",
        )
        parser.add_argument("path", metavar="PATH", type=Path)
        return show(parser.parse_args(sys.argv[2:]).path)
    options = parse()
    from diffmoe.conversion.detect_format import open_source
    from diffmoe.conversion.foreign import Options, write_foreign
    from diffmoe.export.writing import refuse_existing, write_exported

    refuse_existing(options.target)
    unsaid = Options(
        objective=options.objective,
        heads=options.heads,
        num_classes=options.num_classes,
        input_size=options.input_size,
        capacity=1.0 if options.capacity is None else options.capacity,
        top_k=options.top_k,
        autoencoder=options.vae,
        scale=options.scale,
    )
    with open_source(options.source, options.weights, options.format, unsaid) as source:
        source = with_experts(source, options)
        tell(source.notes)
        if options.to != "diffmoe":
            tell(write_foreign(source, options.target, options.to))
            print(printable(f"{options.target}: {options.to} file of {source.where}"))
            return
        limit = int(options.max_shard_gb * 1e9)
        written = write_exported(source, options.target, options.dtype, limit)
    tell(written.notes)
    print(
        f"{printable(str(written.path))}: {written.bytes / 1e6:.2f} MB of {options.dtype}; "
        f"{written.compared} numbers of its predictions equal the source's bit for bit"
    )


if __name__ == "__main__":
    run_command(main)
