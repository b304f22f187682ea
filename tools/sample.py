"""Sample images from a run: a picture of a few, or a folder of many on any number of ranks.

  python tools/sample.py runs/mnist --classes 0,1,2,3 --per-class 5 --guidance 2 --out grid.png
  torchrun --nproc_per_node 8 tools/sample.py runs/xl --num-samples 50000 --out samples/xl
  python tools/sample.py runs/text --prompt "a red seven left of a blue two" --per-prompt 5

RUN is a run's folder (its newest checkpoint is taken), one checkpoint, or a converted model. Image
k of a seed has a noise of its own, and experts decide on each token alone, so that it depends
neither on --batch nor on the ranks. --capacity C takes the thresholds that tools/calibrate.py found
for C: less is quicker, more is better up to a point.

With --num-samples, DIR gets shards samples-*.npz (uint8 images, labels, indices) and samples.json,
which lists them with all that decides the images, captions too. Stopped at any moment, the same
command goes on.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe.cli import (
    add_device,
    add_labels,
    add_prompts,
    add_sampling,
    positive,
    prompts_of,
    say,
    settings_of,
)
from diffmoe.errors import UserError, run_command

if TYPE_CHECKING:
    from diffmoe.capacity.meter import CapacityByTime
    from diffmoe.checkpoints.network import Snapshot
    from diffmoe.diffusion.settings import SamplingSettings
    from diffmoe.models.dit import DiT
    from diffmoe.sampling.images import Decode
    from diffmoe.text.prompts import Prompts
    from diffmoe.work import Ranks


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run's folder, one checkpoint, or a converted model"
    )
    parser.add_argument(
        "--out", metavar="FILE|DIR", help="default grid.png; with --num-samples a folder"
    )
    parser.add_argument(
        "--classes",
        metavar="LIST",
        help="numbers or names, such as 0,cat; default 0; all with --num-samples",
    )
    parser.add_argument(
        "--per-class",
        "--per-prompt",
        dest="each",
        type=positive,
        default=10,
        help="of a picture; default 10",
    )
    # torchrun takes a bare --num for the beginning of an option of its own.
    parser.add_argument(
        "--num-samples", "--num", type=positive, metavar="N", help="make N images in a folder"
    )
    add_labels(parser)
    parser.add_argument(
        "--format",
        choices=["npz", "png", "adm"],
        default="npz",
        help="of --num-samples: default npz; also PNG files, or the one npz of ADM's evaluator",
    )
    parser.add_argument(
        "--shard-size", type=positive, default=1000, help="images a shard; default 1000"
    )
    add_prompts(parser)
    how = add_sampling(parser, steps=250)
    how.add_argument("--weights", choices=["ema", "live"], default="ema", help="default ema")
    compute = parser.add_argument_group("how much to compute")
    compute.add_argument("--capacity", type=float, metavar="C", help="default: as in training")
    compute.add_argument(
        "--routing",
        choices=["per_token", "pooled", "static"],
        help="how experts choose; default the run's moe.inference, per_token",
    )
    where = parser.add_argument_group("where")
    where.add_argument("--batch", type=positive, default=50, help="images at a time; default 50")
    add_device(where)
    where.add_argument(
        "--expert-parallel",
        type=positive,
        default=1,
        metavar="P",
        help="ranks that share the experts; default 1",
    )
    parser.add_argument(
        "--check-digits",
        action="store_true",
        help="for MNIST: print how many samples a classifier of real digits recognizes",
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    import torch.distributed as dist

    from diffmoe.capacity.thresholds import set_capacity
    from diffmoe.data.autoencoders import autoencoder_of
    from diffmoe.export.open import locate, open_network, weights_of
    from diffmoe.parallel.device import setup_device
    from diffmoe.sampling.classes import class_numbers
    from diffmoe.sampling.latents import fitted
    from diffmoe.sampling.many_images import identity
    from diffmoe.sampling.sharing import share_experts
    from diffmoe.work import Ranks

    ranks = Ranks.of_environment()
    device = setup_device(options.device)
    folder = locate(options.run)
    topology = share_experts(options.expert_parallel, ranks, device)
    if options.num_samples is None and ranks.world > 1:
        raise UserError(
            "one process makes a picture; several ranks make a folder, with --num-samples"
        )
    weights = weights_of(folder, options.weights)
    snapshot = open_network(folder, weights, topology, device)
    prompts = prompts_of(options, snapshot.config, device)
    settings = fitted(settings_of(options), snapshot.config, prompts, say)
    settings.chosen_sampler(snapshot.config)
    if prompts is not None and (options.classes or options.check_digits):
        raise UserError("--classes and --check-digits are of models that draw classes; leave them")
    classes = None
    if options.classes:
        names = snapshot.class_names
        classes = class_numbers(options.classes, names, folder)
    calibrated = set_capacity(snapshot.network, folder, options.routing, options.capacity, weights)
    decode = autoencoder_of(snapshot.latents, device).decode
    if options.num_samples is None:
        met = _picture(options, snapshot, decode, settings, prompts, classes)
    else:
        model = identity(folder, snapshot.network, weights, options.capacity)
        met = _folder(options, snapshot, decode, settings, prompts, classes, ranks, model)
    if calibrated is not None and met is not None:
        differing = calibrated.differs(settings, snapshot.config, met.average)
        if differing:
            say(differing)
    if dist.is_initialized():
        dist.destroy_process_group()


def _picture(
    options: argparse.Namespace,
    snapshot: Snapshot,
    decode: Decode,
    settings: SamplingSettings,
    prompts: Prompts | None,
    classes: list[int] | None,
) -> CapacityByTime | None:
    """Returns the capacity of the samples."""
    import numpy as np
    from PIL import Image
    from tqdm import tqdm

    from diffmoe.digits.nearest_neighbor import digit_agreement
    from diffmoe.sampling.images import EvaluationCount, grid, sample_images
    from diffmoe.work import ensure_writable

    out = Path(options.out or "grid.png")
    if out.suffix.lower() not in Image.registered_extensions():
        raise UserError(f"--out {out}: end it in .png or another kind of picture")
    ensure_writable(out.parent)
    wanted = range(len(prompts)) if prompts else classes or [0]
    labels = [label for label in wanted for _ in range(options.each)]
    counted = EvaluationCount()
    with tqdm(total=len(labels), unit="image", dynamic_ncols=True, disable=None) as bar:
        images, capacity = sample_images(
            snapshot.network,
            snapshot.config,
            decode,
            labels,
            range(len(labels)),
            settings,
            prompts=prompts,
            batch=options.batch,
            watch=counted,
            progress=lambda done: bar.update(round(done) - bar.n),
        )
    grid(images, options.each).save(out)
    print(f"{len(labels)} samples at {snapshot.clock.samples} training samples: {out}")
    _tell_capacity(snapshot.network, capacity)
    if options.sampler == "dopri5":
        print(counted.told(counted.mean))
    if options.check_digits:
        share = digit_agreement(images.numpy(), np.array(labels))
        print(f"a 5-nearest-neighbor classifier of real digits agrees with {share:.1%} of these")
    return capacity


def _folder(
    options: argparse.Namespace,
    snapshot: Snapshot,
    decode: Decode,
    settings: SamplingSettings,
    prompts: Prompts | None,
    classes: list[int] | None,
    ranks: Ranks,
    model: dict[str, Any],
) -> CapacityByTime | None:
    """Returns the capacity of the samples on the rank that closes the work."""
    from diffmoe.sampling.formats import write_adm, write_png
    from diffmoe.sampling.images import EvaluationCount
    from diffmoe.sampling.many_images import SampleRequest, generate

    folder, network, config = Path(options.out or "samples"), snapshot.network, snapshot.config
    choices = classes or range(len(prompts) if prompts else config.model.num_classes)
    if options.format == "adm" and snapshot.latents.makes_gray:
        raise UserError(
            "--format adm: ADM's evaluator takes RGB images, this model makes gray ones"
        )
    made = generate(
        folder,
        network,
        config,
        decode,
        SampleRequest(options.num_samples, tuple(choices), options.labels),
        settings,
        model=model,
        prompts=prompts,
        batch=options.batch,
        shard_size=options.shard_size,
        ranks=ranks,
    )
    if made is None:
        print(f"rank {ranks.rank} of {ranks.world} is done; others still work", file=sys.stderr)
        return None
    if not made.closes:
        return None
    written = folder
    if options.format == "png":
        written = write_png(folder)
    elif options.format == "adm":
        written = write_adm(folder, options.num_samples, tuple(made.manifest["image_shape"]))
    print(f"{options.num_samples} samples at {snapshot.clock.samples} training samples: {written}")
    _tell_capacity(network, made.capacity)
    if "evaluations" in made.manifest:
        print(EvaluationCount.told(made.manifest["evaluations"]))
    return made.capacity


def _tell_capacity(network: DiT, capacity: CapacityByTime | None) -> None:
    """C_avg, what it means in parameters, and its course from noise to data."""
    import torch

    from diffmoe.capacity.meter import activated_parameters

    if capacity is None:
        return
    active, total = activated_parameters(network, capacity.average), network.parameter_count()
    steps = torch.linspace(0, len(capacity.times) - 1, min(11, len(capacity.times))).round().long()
    course = ", ".join(
        f"{time:.2f}: {value:.2f}"
        for time, value in zip(capacity.times[steps], capacity.by_time[steps], strict=True)
    )
    print(
        f"capacity {capacity.average:.3f}: {active / 1e6:.2f} of {total / 1e6:.2f} million "
        f"parameters work on an average token\n  from noise (0) to data (1): {course}"
    )


if __name__ == "__main__":
    run_command(main)
