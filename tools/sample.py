"""Sample images from a run: one picture of a few, or a folder of many on any number of ranks.

  python tools/sample.py runs/mnist --classes 0,1,2,3 --per-class 5 --guidance 2 --out grid.png
  torchrun --nproc_per_node 8 tools/sample.py runs/xl --num-samples 50000 --out samples/xl
  python tools/sample.py runs/text --prompt "a red seven left of a blue two" --per-prompt 5

RUN is a run's folder (the newest checkpoint is used), one checkpoint, or a converted model. Image k
of a seed has its own noise, and experts decide on each token by itself, so the image depends
neither on --batch nor on the number of ranks. --capacity C uses the thresholds that
tools/calibrate.py found for C: less is faster, more is better up to a point.

With --num-samples, DIR gets shards samples-*.npz (uint8 images, labels, indices; with --format
latents fp32 latents for an autoencoder that is elsewhere) and samples.json,
which lists them with everything that determines the images, captions included. The command can be
interrupted at any time; running it again makes the images that are missing.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffmoe.cli import (
    add_adapters,
    add_batch,
    add_capacity,
    add_decoder,
    add_device,
    add_dtype,
    add_expert_parallel,
    add_labels,
    add_num_samples,
    add_prompts,
    add_routing,
    add_run,
    add_sampling,
    add_weights,
    open_sampler,
    positive,
    say,
    settings_of,
)
from diffmoe.diffusion.settings import STEPS
from diffmoe.errors import UserError, run_command

if TYPE_CHECKING:
    from diffmoe.capacity.meter import CapacityByTime
    from diffmoe.diffusion.settings import SamplingSettings
    from diffmoe.sampling.sampler import Sampler
    from diffmoe.work import Ranks


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run(parser)
    parser.add_argument(
        "--out",
        metavar="FILE|DIR",
        help="default grid.png; with --num-samples a folder, default samples",
    )
    parser.add_argument(
        "--classes",
        metavar="LIST",
        help="numbers, ranges or names, such as 0-4,cat; default 0; with --num-samples all classes",
    )
    parser.add_argument(
        "--per-class",
        "--per-prompt",
        dest="each",
        type=positive,
        default=10,
        metavar="N",
        help="images per class or prompt (default 10)",
    )
    add_num_samples(parser, "make N images in a folder")
    add_labels(parser)
    parser.add_argument(
        "--format",
        choices=["npz", "png", "adm", "latents"],
        default="npz",
        help="with --num-samples: default npz; png adds PNG files, adm the one npz of ADM's "
        "evaluator; latents: fp32, as the autoencoder's decoder takes them, in place of images",
    )
    parser.add_argument(
        "--shard-size",
        type=positive,
        metavar="N",
        help="images a shard, made again together after a stop; default 50",
    )
    add_prompts(parser)
    add_weights(add_sampling(parser, STEPS))
    add_adapters(parser)
    compute = parser.add_argument_group("how much to compute")
    add_capacity(compute)
    add_routing(compute)
    where = parser.add_argument_group("where")
    add_batch(where)
    add_device(where)
    add_decoder(where)
    add_dtype(where)
    add_expert_parallel(where)
    parser.add_argument(
        "--check-digits",
        action="store_true",
        help="for MNIST: print how many samples a classifier of real digits recognizes",
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    import torch.distributed as dist

    from diffmoe.parallel.device import setup_device
    from diffmoe.sampling.classes import class_numbers
    from diffmoe.sampling.sharing import share_experts
    from diffmoe.work import Ranks

    ranks, device = Ranks.of_environment(), setup_device(options.device)
    topology = share_experts(options.expert_parallel, ranks, device)
    if options.num_samples is None and ranks.world > 1:
        raise UserError(
            "one process makes a picture; several ranks make a folder, with --num-samples"
        )
    to_latents = options.format == "latents"
    if to_latents and options.num_samples is None:
        raise UserError("--format latents fills a folder: give --num-samples N")
    sampler = open_sampler(options, device, topology, with_autoencoder=not to_latents)
    if to_latents:
        sampler = sampler.without_decoder()
    sampler = sampler.with_capacity(options.capacity, options.routing)
    if sampler.prompts is not None and (options.classes or options.check_digits):
        raise UserError(
            "--classes and --check-digits are for models that draw classes; leave them out"
        )
    settings = sampler.fitted(settings_of(options), say)
    classes = None
    if options.classes:
        names, path = sampler.model.class_names, sampler.model.path
        classes = class_numbers(options.classes, names, path)
    if options.num_samples is None:
        met = draw_picture(options, sampler, settings, classes)
    else:
        met = fill_folder(options, sampler, settings, classes, ranks)
    note = sampler.calibration_note(settings, met)
    if note:
        say(note)
    if dist.is_initialized():
        dist.destroy_process_group()


def draw_picture(
    options: argparse.Namespace,
    sampler: Sampler,
    settings: SamplingSettings,
    classes: list[int] | None,
) -> CapacityByTime | None:
    """Returns the capacity of the samples."""
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from diffmoe.contact_sheet import with_names
    from diffmoe.digits.nearest_neighbor import digit_agreement
    from diffmoe.sampling.images import grid
    from diffmoe.work import ensure_writable

    out = Path(options.out or "grid.png")
    if out.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--out {out}: end it in .png or another kind of picture")
    ensure_writable(out.parent)
    rows = classes or ([0] if sampler.prompts is None else range(sampler.choices))
    labels = [label for label in rows for _ in range(options.each)]
    with tqdm(total=len(labels), unit="image", dynamic_ncols=True, disable=None) as bar:
        made = sampler.images(
            labels,
            settings,
            batch=options.batch,
            progress=lambda done: bar.update(round(done) - bar.n),
        )
    names = sampler.model.class_names if sampler.prompts is None else sampler.prompts.captions
    picture = grid(made.images, options.each)
    if names:
        picture = with_names(picture, [names[row] for row in rows])
    picture.save(out)
    print_result(sampler, len(labels), out, made.capacity, made.evaluations)
    if options.check_digits:
        share = digit_agreement(made.images.numpy(), np.array(labels))
        print(f"a 5-nearest-neighbor classifier of real digits agrees with {share:.1%} of these")
    return made.capacity


def fill_folder(
    options: argparse.Namespace,
    sampler: Sampler,
    settings: SamplingSettings,
    classes: list[int] | None,
    ranks: Ranks,
) -> CapacityByTime | None:
    """Returns the capacity of the samples, on the rank that reports."""
    from diffmoe.sampling.formats import write_adm, write_png

    out, number = Path(options.out or "samples"), options.num_samples
    if options.format == "adm" and sampler.model.latents.makes_gray:
        raise UserError(
            "--format adm: ADM's evaluator takes RGB images, this model makes gray ones"
        )
    request = sampler.request(number, options.labels, classes)
    made = sampler.folder(
        out,
        request,
        settings,
        batch=options.batch,
        shard_size=options.shard_size,
        ranks=ranks,
    )
    if made is None:
        print(f"rank {ranks.rank} of {ranks.world} is done; others still work", file=sys.stderr)
    if made is None or not made.closes:
        return None
    if options.format == "png":
        out = write_png(out)
    elif options.format == "adm":
        out = write_adm(out, number, tuple(made.manifest["image_shape"]))
    print_result(sampler, number, out, made.capacity, made.manifest.get("evaluations"))
    return made.capacity


def print_result(
    sampler: Sampler,
    number: int,
    out: Path,
    capacity: CapacityByTime | None,
    evaluations: float | None,
) -> None:
    from diffmoe.capacity.meter import capacity_text
    from diffmoe.sampling.images import dopri5_note

    print(
        f"{number} samples at {sampler.model.clock.samples} training samples, "
        f"{sampler.model.weights} weights: {out}"
    )
    if capacity is not None:
        print(capacity_text(sampler.network, capacity))
    if evaluations is not None:
        print(dopri5_note(evaluations))


if __name__ == "__main__":
    run_command(main)
