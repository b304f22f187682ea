"""Figures of a model, or of images: FD (FID), sFD, inception score, KID, precision, recall.

  python tools/evaluate.py reference photos/test --out references/test.npz
  python tools/evaluate.py runs/photos --num 10000 --steps 50 --reference references/test.npz
  python tools/evaluate.py images samples/xl --num 50000 --reference VIRTUAL_imagenet256.npz
  python tools/evaluate.py runs/text --num 400 --prompts unseen.txt --truth unseen.json
  python tools/evaluate.py images samples/text --clip models/clip-vit-large-patch14
  python tools/evaluate.py plot evaluation/photos --metric FD --against samples --out fd.png

RUN is a run's folder, one checkpoint, or a converted model. Its samples and results.jsonl, a line
for each evaluation with all that defines the figures, go to --out. Stopped at any moment, the same
command goes on; done again, it gives the same figures.

A reference is a file of `reference`, ADM's npz, a folder of our samples or of image files, or our
shards of pixels; so are images. Every figure is named for its extractor (--extractor):
efficientnet_lite0@224, whose weights come with diffmoe[eval]; a local inception-2015-12-05.pt, for
FID, or torch-fidelity's weights-inception-2015-12-05-6726825d.pth, for FID and sFID, both known by
checksum; another TorchScript FILE.pt; or package.module:function. The last two run what is in
them: give those that you trust. Nothing is downloaded.

Of images with captions, --clip takes a local folder of transformers' CLIPModel: 100 max(cosine, 0)
of each image and its caption, averaged. --truth tells how many of captioned-digits' scenes show the
colors and digits that were asked for, each at its place, beside the same of real held-out ones.
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
    from diffmoe.config import Config
    from diffmoe.evaluation.clip_score import Clip
    from diffmoe.evaluation.extractors import Extractor
    from diffmoe.evaluation.image_sets import ImageSet
    from diffmoe.evaluation.references import Reference
    from diffmoe.evaluation.scenes import Scene, SceneReader
    from diffmoe.text.prompts import Prompts

EXTRACTOR = "efficientnet_lite0@224"


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(metavar="RUN | reference | images | plot", required=True)
    model = commands.add_parser("model", help="RUN alone says the same")
    model.set_defaults(command=evaluate_run)
    model.add_argument("run", metavar="RUN")
    model.add_argument(
        "--num-samples", "--num", type=positive, required=True, metavar="N", help="images to make"
    )
    model.add_argument("--every-snapshot", action="store_true", help="all averages of a run")
    model.add_argument("--out", metavar="DIR", help="default evaluation/ and the run's name")
    add_labels(model)
    how = add_sampling(model, 250, "how to sample, see tools/sample.py --help")
    how.add_argument("--weights", choices=["ema", "live"], default="ema", help="default ema")
    how.add_argument("--capacity", type=float, metavar="C")
    how.add_argument("--routing", choices=["per_token", "pooled", "static"])
    how.add_argument("--batch", type=positive, default=50, help="images at a time; default 50")
    how.add_argument("--expert-parallel", type=positive, default=1, metavar="P", help="default 1")
    add_prompts(model)
    images = commands.add_parser("images", help="judge images that are there")
    images.set_defaults(command=evaluate_images)
    images.add_argument("images", metavar="IMAGES")
    images.add_argument("--num", type=positive, metavar="N", help="refuse any other number")
    images.add_argument("--out", default="evaluation", metavar="DIR", help="default evaluation")
    for parser_ in (model, images):
        parser_.add_argument("--reference", metavar="REF")
        parser_.add_argument(
            "--classifier", help="class accuracy: digits, or code to run: FILE.pt, module:name"
        )
        parser_.add_argument("--clip", metavar="DIR", help="CLIP score, of images with captions")
        parser_.add_argument(
            "--truth", metavar="JSON", help="captioned-digits' unseen.json: read scenes by it"
        )
    reference = commands.add_parser("reference", help="compute and store a reference's statistics")
    reference.set_defaults(command=make_reference)
    reference.add_argument("images", metavar="IMAGES")
    reference.add_argument("--out", required=True, metavar="FILE.npz")
    for parser_ in (model, images, reference):
        parser_.add_argument("--extractor", default=EXTRACTOR, help=f"default {EXTRACTOR}")
        parser_.add_argument("--extractor-batch", type=positive, default=25, help="default 25")
        parser_.add_argument(
            "--background",
            default="white",
            metavar="COLOR",
            help="of transparent image files; default white",
        )
        add_device(parser_)
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
    """`--guidance-interval 0.2 0.9` is how this tool alone once had it; see tools/sample.py."""
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

    from diffmoe.evaluation.image_sets import open_images
    from diffmoe.evaluation.models import check_judges, sample_model, snapshots
    from diffmoe.export.open import locate
    from diffmoe.parallel.device import setup_device
    from diffmoe.sampling.sharing import share_experts
    from diffmoe.work import Ranks

    judge = Judge(options)
    device, ranks = setup_device(options.device), Ranks.of_environment()
    topology = share_experts(options.expert_parallel, ranks, device)
    settings = settings_of(options)

    def asked_for(config: Config) -> Prompts | None:
        prompts = prompts_of(options, config, device)
        check_judges(prompts, options.classifier, options.truth, options.clip)
        return prompts

    run = Path(options.run)
    out = Path(options.out or Path("evaluation") / run.resolve().name)
    for model in snapshots(run) if options.every_snapshot else [locate(run)]:
        made = sample_model(
            model,
            out,
            options.num_samples,
            settings,
            weights=options.weights,
            routing=options.routing,
            capacity=options.capacity,
            labels=options.labels,
            batch=options.batch,
            device=device,
            ranks=ranks,
            topology=topology,
            rgb=bool(options.reference),
            prompts_for=asked_for,
            say=say,
        )
        if made is not None:
            images = open_images(made.folder).expect(options.num_samples)
            print(f"{model}, {made.about['clock']['samples']} training samples")
            judge.tell(images, out, made.about)
    if dist.is_initialized():
        dist.destroy_process_group()


def evaluate_images(options: argparse.Namespace) -> None:
    from diffmoe.evaluation.image_sets import open_images
    from diffmoe.prepare.images import parse_color

    images = open_images(options.images, parse_color(options.background)).expect(options.num)
    Judge(options).tell(images, Path(options.out), {})


class Judge:
    """Reference, extractor and classifier of a command, loaded once and when first needed."""

    def __init__(self, options: argparse.Namespace) -> None:
        from diffmoe.evaluation.clip_score import Clip
        from diffmoe.evaluation.extractors import load_extractor
        from diffmoe.evaluation.judges import load_classifier
        from diffmoe.evaluation.references import check_reference
        from diffmoe.evaluation.scenes import load_truth
        from diffmoe.parallel.device import setup_device
        from diffmoe.prepare.images import parse_color

        if not (options.reference or options.classifier or options.clip or options.truth):
            raise UserError("nothing to judge by: give --reference REF, --classifier NAME or both")
        self.options = options
        self.device = setup_device(options.device)
        self.background = parse_color(options.background)
        self.extractor: Extractor | None = None
        self.reference: Reference | None = None
        self.classifier: tuple[str, str | None, Any] | None = None
        self.clip: Clip | None = None
        self.truth: dict[str, Scene] | None = None
        self.read: SceneReader | None = None
        if options.reference and not Path(options.reference).exists():
            raise UserError(f"--reference {options.reference} does not exist")
        if options.reference:
            self.extractor = load_extractor(options.extractor, self.device)
            check_reference(options.reference, self.extractor)  # before any work
        if options.classifier:
            self.classifier = load_classifier(options.classifier, self.device)
        if options.clip:
            self.clip = Clip(options.clip, self.device)
        if options.truth:
            self.truth = load_truth(options.truth)

    def tell(self, images: ImageSet, out: Path, about: dict[str, Any]) -> None:
        """Print the figures, and add them to out/results.jsonl."""
        from diffmoe.evaluation import results
        from diffmoe.evaluation.references import load_reference
        from diffmoe.evaluation.scenes import SceneReader

        batch, found = self.options.extractor_batch, []
        if self.extractor is not None:
            if self.reference is None:
                self.reference = load_reference(
                    self.options.reference, self.extractor, batch, self.background
                )
            found.append(results.measure(images, self.extractor, self.reference, batch))
        if self.classifier is not None:
            found.append(results.measure_accuracy(images, self.classifier, batch))
        if self.clip is not None:
            found.append(results.measure_clip(images, self.clip, batch))
        if self.truth is not None:
            if self.read is None:
                self.read = SceneReader()
            found.append(results.measure_scenes(images, self.truth, self.read, batch))
        for result in found:
            results.append(out / results.FILE_NAME, result | about)
            print(results.table(result))


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
