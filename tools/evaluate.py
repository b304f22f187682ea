"""Figures of a model, or of images: FD (FID), sFD, inception score, KID, precision, recall, loss.

  python tools/evaluate.py reference photos/test --out references/test.npz
  python tools/evaluate.py runs/photos --num 10000 --steps 50 --reference references/test.npz
  python tools/evaluate.py runs/photos --num 10000 --guidance 1 1.5 2 --reference photos/test
  python tools/evaluate.py images samples/xl --num 50000 --reference VIRTUAL_imagenet256.npz
  python tools/evaluate.py runs/text --num 400 --prompts unseen.txt --truth unseen.json
  python tools/evaluate.py images samples/text --clip models/clip-vit-large-patch14
  python tools/evaluate.py loss runs/photos --every-snapshot
  python tools/evaluate.py plot evaluation/photos --metric FD --against samples --out fd.png

`loss` measures the held-out loss, the training objective on samples that were not trained on: by
default those of the run's validation.path, as training.validate_every does, with the routing of
inference (--routing static: that of training). What was measured before is not measured again.

RUN is a run's folder, one checkpoint, or a converted model. Its samples go to --out, and so does
results.jsonl, one line per evaluation with everything that defines the figures. The command can be
interrupted at any time and picks up where it stopped; repeated, it gives the same figures. Of
several guidance scales, the first metric against them is drawn to guidance.png there, too.

A reference is a file written by `reference`, ADM's npz, a folder of our samples or of image files,
or our shards of pixels; images are given in the same ways. Every figure carries the name of its
extractor (--extractor): efficientnet_lite0@224, whose weights come with diffmoe[eval]; a local
inception-2015-12-05.pt, for FID, or torch-fidelity's weights-inception-2015-12-05-6726825d.pth, for
FID and sFID, both recognized by checksum; another TorchScript FILE.pt; or package.module:function.
The last two execute code: give only those that you trust. Nothing is downloaded.

For images with captions, --clip takes a local folder of transformers' CLIPModel: the mean of
100 max(cosine, 0) over images and their captions. --truth reports how many of captioned-digits'
scenes show the requested colors and digits, each at its place, beside the same for real held-out
scenes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffmoe.cli import (
    add_adapters,
    add_batch,
    add_capacity,
    add_data,
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
    sweep_of,
)
from diffmoe.diffusion.settings import STEPS
from diffmoe.errors import run_command

if TYPE_CHECKING:
    import torch

    from diffmoe.evaluation.evaluator import Evaluator
    from diffmoe.evaluation.image_sets import ImageSet

EXTRACTOR = "efficientnet_lite0@224"


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(
        metavar="RUN | loss | reference | images | plot", required=True
    )
    model = commands.add_parser("model", help="the same as RUN alone")
    model.set_defaults(command=evaluate_run)
    add_run(model)
    add_num_samples(model, "images to make", required=True)
    which = model.add_mutually_exclusive_group()  # adapters belong to one model
    which.add_argument("--every-snapshot", action="store_true", help="all averages of a run")
    add_adapters(which)
    model.add_argument("--out", metavar="DIR", help="default evaluation/ and the run's name")
    add_labels(model)
    how = add_sampling(model, STEPS, sweep=True)
    add_weights(how)
    add_capacity(how)
    add_routing(how)
    add_batch(how)
    add_dtype(how)
    add_expert_parallel(how)
    add_decoder(how)
    add_prompts(model)
    loss = commands.add_parser("loss", help="measure the held-out loss of a model")
    loss.set_defaults(command=evaluate_loss)
    add_run(loss)
    which = loss.add_mutually_exclusive_group()
    which.add_argument(
        "--every-snapshot",
        action="store_true",
        help="all complete checkpoints and averages of a run; draws validation_loss.png, too",
    )
    add_adapters(which)
    loss.add_argument("--out", metavar="DIR", help="default evaluation/ and the run's name")
    add_data(loss, "that were not trained on (validation.path)")
    loss.add_argument(
        "--samples",
        type=positive,
        metavar="N",
        help="how many; default: the run's validation.samples, 2048 of a converted model",
    )
    loss.add_argument(
        "--seed",
        type=int,
        help="of the noise and of which samples; default: the run's, 0 of a converted model",
    )
    loss.add_argument(
        "--dtype",
        "--precision",
        dest="precision",
        choices=["fp32", "bf16"],
        help="of weights and products, as in training; default: the run's, so that the loss is the "
        "one that training recorded; of a converted model bf16 on a GPU, fp32 on a CPU",
    )
    add_weights(loss)
    add_capacity(loss)
    add_routing(loss)
    add_device(loss)
    images = commands.add_parser("images", help="evaluate existing images")
    images.set_defaults(command=evaluate_images)
    images.add_argument("images", metavar="IMAGES")
    images.add_argument("--num", type=positive, metavar="N", help="refuse any other number")
    images.add_argument("--out", default="evaluation", metavar="DIR", help="default evaluation")
    reference = commands.add_parser("reference", help="compute and store a reference's statistics")
    reference.set_defaults(command=make_reference)
    reference.add_argument("images", metavar="IMAGES")
    reference.add_argument("--out", required=True, metavar="FILE.npz")
    for judging in (model, images):
        judging.add_argument("--reference", metavar="REF")
        judging.add_argument(
            "--classifier", help="class accuracy: digits, or code to run: FILE.pt, module:name"
        )
        judging.add_argument("--clip", metavar="DIR", help="CLIP score, for images with captions")
        judging.add_argument(
            "--truth", metavar="JSON", help="captioned-digits' unseen.json: judge scenes by it"
        )
    for extracting in (model, images, reference):
        extracting.add_argument("--extractor", default=EXTRACTOR, help=f"default {EXTRACTOR}")
        extracting.add_argument(
            "--extractor-batch",
            type=positive,
            default=25,
            metavar="N",
            help="images at a time; default 25",
        )
        extracting.add_argument(
            "--background",
            default="white",
            metavar="COLOR",
            help="of transparent image files; default white",
        )
        add_device(extracting)
    curve = commands.add_parser("plot", help="draw results of one or several runs")
    curve.set_defaults(command=draw)
    curve.add_argument("results", nargs="+", metavar="RESULTS", help="files, or folders of one")
    curve.add_argument("--metric", default="FD", help="with or without the extractor; default FD")
    curve.add_argument(
        "--against",
        choices=["samples", "guidance", "capacity"],
        default="samples",
        help="default samples",
    )
    curve.add_argument("--out", default="curve.png", metavar="FILE", help="default curve.png")
    if words and words[0] not in (*commands.choices, "-h", "--help"):
        words = ["model", *words]
    return parser.parse_args(_with_comma(words))


def _with_comma(words: list[str]) -> list[str]:
    """Join `--guidance-interval 0.2 0.9`, an older spelling of this tool, with a comma."""
    flag = "--guidance-interval"
    at = words.index(flag) + 1 if flag in words else len(words)
    ends = words[at : at + 2]
    if len(ends) == 2 and not any("," in end or end.startswith("--") for end in ends):
        return [*words[:at], ",".join(ends), *words[at + 2 :]]
    return words


def main() -> None:
    options = parse(sys.argv[1:])
    options.command(options)


def evaluate_run(options: argparse.Namespace) -> None:
    import torch.distributed as dist

    from diffmoe.evaluation.curves import plot
    from diffmoe.evaluation.image_sets import open_images
    from diffmoe.evaluation.models import check_judges, sample_model, snapshots
    from diffmoe.parallel.device import setup_device
    from diffmoe.sampling.latents import check_sampling
    from diffmoe.sampling.sharing import share_experts
    from diffmoe.work import Ranks

    device, ranks = setup_device(options.device), Ranks.of_environment()
    evaluator = evaluator_of(options, device)
    topology = share_experts(options.expert_parallel, ranks, device)
    run, sweep, metric = Path(options.run), sweep_of(options), None
    out = Path(options.out or Path("evaluation") / run.resolve().name)
    for path in snapshots(run) if options.every_snapshot else [run]:
        options.run = path
        sampler = open_sampler(options, device, topology)
        sampler = sampler.with_capacity(options.capacity, options.routing)
        check_judges(sampler.prompts, options.classifier, options.truth, options.clip)
        chosen = [sampler.fitted(settings, say) for settings in sweep]
        for settings in chosen:  # all of them, before any image is made
            check_sampling(sampler.network, sampler.config, (), settings, sampler.prompts)
        for settings in chosen:
            made = sample_model(
                sampler,
                out,
                sampler.request(options.num_samples, options.labels),
                settings,
                batch=options.batch,
                ranks=ranks,
                rgb=bool(options.reference),
                say=say,
            )
            if made is not None:
                images = open_images(made.folder).expect(options.num_samples)
                scale = f", guidance {settings.guidance:g}" if len(sweep) > 1 else ""
                print(f"{sampler.model.title}, {made.clock.samples} training samples{scale}")
                metric = write_results(evaluator, images, out, made.about)
    if metric is not None and len(sweep) > 1:
        print(f"{plot([out], metric, 'guidance', out / 'guidance.png')}: {out / 'guidance.png'}")
    if dist.is_initialized():
        dist.destroy_process_group()


def evaluate_loss(options: argparse.Namespace) -> None:
    from diffmoe.evaluation import loss, results
    from diffmoe.export.exported_model import is_exported
    from diffmoe.parallel.device import default_dtype, setup_device
    from diffmoe.work import ensure_writable

    device, run = setup_device(options.device), Path(options.run)
    out = Path(options.out or Path("evaluation") / run.resolve().name)
    ensure_writable(out)
    precision = options.precision
    if precision is None and (is_exported(run) or options.adapters):  # which do not tell theirs
        precision = default_dtype(device)
    asked = {
        "validation.path": options.data,
        "validation.samples": options.samples,
        "seed": options.seed,
        "training.precision": precision,
    }
    changes = {key: value for key, value in asked.items() if value is not None}
    changes["data.allow_commands"] = options.allow_commands
    found = []
    for path in loss.stored(run, options.weights, say) if options.every_snapshot else [run]:
        options.run = path
        sampler = open_sampler(options, device, with_autoencoder=False, with_prompts=False)
        sampler = sampler.with_capacity(options.capacity, options.routing)
        config = sampler.config.replace(changes)
        found.append(loss.measure_once(sampler, config, out / results.FILE_NAME, say))
        if len(found) == 1:
            print(loss.HEAD)
        print(loss.row(found[-1]), flush=True)
    print(loss.details(found[-1]))
    if options.every_snapshot:
        loss.plot(found, run.resolve().name, out / f"{loss.METRIC}.png")


def evaluate_images(options: argparse.Namespace) -> None:
    from diffmoe.evaluation.image_sets import open_images
    from diffmoe.parallel.device import setup_device
    from diffmoe.prepare.images import parse_color

    images = open_images(options.images, parse_color(options.background)).expect(options.num)
    evaluator = evaluator_of(options, setup_device(options.device))
    write_results(evaluator, images, Path(options.out), {})


def evaluator_of(options: argparse.Namespace, device: torch.device) -> Evaluator:
    from diffmoe.evaluation.evaluator import Evaluator, Judges
    from diffmoe.prepare.images import parse_color

    judges = Judges(
        reference=options.reference,
        extractor=options.extractor,
        classifier=options.classifier,
        clip=options.clip,
        truth=options.truth,
        batch=options.extractor_batch,
        background=parse_color(options.background),
    )
    return Evaluator(judges, device)


def write_results(evaluator: Evaluator, images: ImageSet, out: Path, about: dict[str, Any]) -> str:
    """Print the figures, and add them to out/results.jsonl. Returns the first metric's name."""
    from diffmoe.evaluation import results

    found = evaluator.measure(images)
    for result in found:
        results.append(out / results.FILE_NAME, result | about)
        print(results.table(result))
    return next(iter(found[0]["metrics"]))


def make_reference(options: argparse.Namespace) -> None:
    from diffmoe.evaluation.extractors import load_extractor
    from diffmoe.evaluation.references import compute_reference, store_reference
    from diffmoe.parallel.device import setup_device
    from diffmoe.prepare.images import parse_color

    extractor = load_extractor(options.extractor, setup_device(options.device))
    reference = compute_reference(
        options.images, extractor, options.extractor_batch, parse_color(options.background)
    )
    store_reference(Path(options.out), reference)
    print(f"{options.out}: {reference.about['number']} images by {extractor.name}")


def draw(options: argparse.Namespace) -> None:
    from diffmoe.evaluation.curves import plot

    paths = [Path(path) for path in options.results]
    name = plot(paths, options.metric, options.against, Path(options.out))
    print(f"{name} against {options.against}: {options.out}")


if __name__ == "__main__":
    run_command(main)
