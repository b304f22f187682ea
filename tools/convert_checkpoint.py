"""Convert models: checkpoints and other projects' weights to a folder for inference, and back.

  python tools/convert_checkpoint.py runs/mnist exported/mnist      the newest checkpoint's EMA
  python tools/convert_checkpoint.py runs/mnist exported/avg --weights ema:0.10 --dtype bfloat16
  python tools/convert_checkpoint.py release.pt exported/release --objective flow
  python tools/convert_checkpoint.py exported/release release2.pt --to release
  python tools/convert_checkpoint.py runs/mnist shared/mnist --to diffusers
  python tools/convert_checkpoint.py exported/dense exported/moe --upcycle --experts 8
  python tools/convert_checkpoint.py runs/mnist served/mnist --to pt2   runs with torch alone
  python tools/convert_checkpoint.py runs/tuned adapters/tuned --adapters
  python tools/convert_checkpoint.py info exported/mnist            describe the model at a path

FROM is a run's folder, a checkpoint step-XXXXXXXX or ema-XXXXXXXX saved by any number of ranks, an
exported folder, a .pt file of the DiffMoE release, DiT or SiT, or a folder of diffusers'
DiTTransformer2DModel or of a pipeline with one (its vae/ and scheduler are used). TO must not
exist. It is written atomically, and its predictions are checked to be bit-identical to FROM's. No
GPU is needed, and the memory of one network. Open the result with diffmoe.load(TO) or
diffmoe.Pipeline(TO).

--to diffusers writes a folder that diffusers opens without this package: a dense DDPM model of
classes as its own DiTTransformer2DModel, any other as an exported folder with its code in it
(pipeline.py), which diffmoe opens, too, and tools/publish.py publishes. README.md there has the
lines.
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
PROGRAMS = ("pt2", "onnx")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", metavar="FROM", type=Path)
    parser.add_argument("target", metavar="TO", type=Path)
    parser.add_argument(
        "--weights",
        default="ema",
        help="ema (default) or live (entries `ema` and `model` of a .pt file), or ema:STD, such as "
        "ema:0.10, of a run with training.ema_stds",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of TO (default float32)",
    )
    parser.add_argument(
        "--to",
        choices=["diffmoe", *FORMATS, *PROGRAMS],
        default="diffmoe",
        help="format of TO (default diffmoe, the folder for inference); diffusers takes any model; "
        "pt2, onnx: the network with static routing as a program of torch.export or ONNX, beside a "
        "sample.py that needs torch alone, for ONNX onnxruntime, too",
    )
    parser.add_argument(
        "--max-shard-gb", type=float, default=5.0, help="size of a file (default 5)"
    )
    parser.add_argument(
        "--capacity",
        type=float,
        metavar="C",
        help="capacity of training: of a .pt file (default 1), or for an upcycled model; or of "
        "static routing, with --to pt2|onnx (default: that of training)",
    )
    parser.add_argument(
        "--adapters",
        action="store_true",
        help="of a LoRA run: write what it trained alone, for sample.py RUN --adapters TO or "
        "diffmoe.Pipeline(RUN, adapters=TO); default: merged into the weights",
    )
    more = parser.add_argument_group("more experts (continue training with training.init=TO)")
    how = more.add_mutually_exclusive_group()
    how.add_argument(
        "--upcycle",
        choices=["shared", "copies"],
        nargs="?",
        const="shared",
        help="turn a dense model into a DiffMoE with the same output. shared (default): experts "
        "beside its MLP, exact at any capacity; copies: E copies of its MLP, exact at capacity E",
    )
    how.add_argument(
        "--grow", action="store_true", help="multiply the experts, with the same output"
    )
    more.add_argument("--experts", type=int, metavar="E", help="number of experts of TO")
    more.add_argument(
        "--every-block", action="store_true", help="experts in every block (default: every second)"
    )
    more.add_argument(
        "--noise",
        type=float,
        default=0.0,
        help="noise on new experts, in standard deviations of their weights (default 0)",
    )
    more.add_argument(
        "--seed", type=int, default=0, help="seed of noise and new routers (default 0)"
    )
    foreign = parser.add_argument_group("what other projects' files may not contain")
    foreign.add_argument("--format", choices=FORMATS, help="format of FROM (default: detected)")
    foreign.add_argument("--objective", choices=["flow", "ddpm"])
    foreign.add_argument("--heads", type=int, help="attention heads (default: by published widths)")
    foreign.add_argument(
        "--num-classes",
        type=int,
        metavar="N",
        help="without the null label (default: from the file, or 1000 for 1001 rows of labels)",
    )
    foreign.add_argument(
        "--input-size", type=int, help="height and width of the latents (default: from pos_embed)"
    )
    foreign.add_argument(
        "--top-k", type=int, default=1, help="experts per token of token choice (default 1)"
    )
    foreign.add_argument(
        "--vae",
        help="autoencoder: a hub id, or a folder, which is copied (default: a pipeline's own vae/, "
        "else stabilityai/sd-vae-ft-ema)",
    )
    foreign.add_argument(
        "--scale",
        type=float,
        help="scale of its latents (default: from the folder of --vae, else 0.18215)",
    )
    return parser.parse_args()


def with_experts(source: Source, options: argparse.Namespace) -> Source:
    """The source after --upcycle or --grow, if either is given."""
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


def check_used(source: Source, options: argparse.Namespace, own_class: bool) -> None:
    """Raise UserError for a flag that would be passed over."""
    before = source.metadata.moe.capacity
    if options.capacity not in (None, before) and options.to not in PROGRAMS:
        raise UserError(
            f"--capacity {options.capacity:g}: {source.where} was trained at {before:g}, which TO "
            "keeps; choose C when sampling (tools/calibrate.py)"
        )
    if options.dtype != "float32" and options.to in FORMATS and own_class:
        raise UserError(
            f"--dtype {options.dtype}: the format {options.to} is written in float32; leave it out"
        )


def write_apart(options: argparse.Namespace) -> None:
    """The adapters of a LoRA run, without its base."""
    from diffmoe.export.adapter_writing import write_adapters
    from diffmoe.export.sources import unmerged_source

    if options.to != "diffmoe" or options.upcycle or options.grow:
        raise UserError("--adapters writes a run's own factors; leave --to, --upcycle, --grow out")
    with unmerged_source(options.source, options.weights) as source:
        size = write_adapters(source, options.target, options.dtype)
    target = printable(str(options.target))
    print(f"{target}: {size / 1e6:.2f} MB of {options.dtype}, for the model {source.base}")


def print_notes(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(printable(note), file=sys.stderr)


def print_info(path: Path) -> None:
    from diffmoe.conversion.info import info

    lines = info(path)
    width = max(map(len, lines))
    for key, value in lines.items():
        print(f"{key:{width}}  {printable(value)}")


def main() -> None:
    if sys.argv[1:2] == ["info"]:
        parser = argparse.ArgumentParser(
            prog="convert_checkpoint.py info",
            description="describe the model at a path",
        )
        parser.add_argument("path", metavar="PATH", type=Path)
        return print_info(parser.parse_args(sys.argv[2:]).path)
    options = parse()
    from diffmoe.conversion.detect_format import open_source
    from diffmoe.conversion.foreign import Options, write_foreign
    from diffmoe.conversion.hugging_face import has_own_class
    from diffmoe.export.writing import refuse_existing, write_exported

    refuse_existing(options.target)
    if options.adapters:
        return write_apart(options)
    unknown = Options(
        objective=options.objective,
        heads=options.heads,
        num_classes=options.num_classes,
        input_size=options.input_size,
        capacity=1.0 if options.capacity is None else options.capacity,
        top_k=options.top_k,
        autoencoder=options.vae,
        scale=options.scale,
    )
    with open_source(options.source, options.weights, options.format, unknown) as source:
        source = with_experts(source, options)
        own_class = options.to != "diffusers" or has_own_class(source.metadata)
        check_used(source, options, own_class)
        print_notes(source.notes)
        if options.to in PROGRAMS:
            from diffmoe.export.program import write_program

            form, dtype, capacity = options.to, options.dtype, options.capacity
            print_notes(write_program(source, options.target, form, dtype, capacity))
            print(printable(f"{options.target}: {source.where} as {options.to}"))
            return
        if options.to in FORMATS and own_class:
            print_notes(write_foreign(source, options.target, options.to))
            print(printable(f"{options.target}: {source.where} in the format {options.to}"))
            return
        limit = int(options.max_shard_gb * 1e9)
        written = write_exported(
            source, options.target, options.dtype, limit, diffusers=not own_class
        )
    print_notes(written.notes)
    print(
        f"{printable(str(written.path))}: {written.bytes / 1e6:.2f} MB of {options.dtype}; "
        f"{written.compared} predicted numbers equal the source's bit for bit"
    )


if __name__ == "__main__":
    run_command(main)
