"""See what the experts of a run do: one HTML page with all figures in it.

  python tools/report_routing.py runs/mnist --out runs/mnist/routing.html

Samples images with the EMA weights and analyzes every evaluation: compute by time, layer, expert,
class (or caption) and place in the image, tokens that no expert takes, experts that take the same
tokens, dead experts. With the run's data available (or --data DIR) also how well the capacity
predictor predicts the selection of training.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffmoe.cli import (
    add_adapters,
    add_batch,
    add_capacity,
    add_data,
    add_decoder,
    add_device,
    add_dtype,
    add_labels,
    add_prompts,
    add_run,
    add_sampling,
    data_config,
    open_sampler,
    positive,
    say,
    settings_of,
)
from diffmoe.diffusion.settings import PREVIEW_STEPS
from diffmoe.errors import run_command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run(parser)
    add_adapters(parser)
    parser.add_argument(
        "--out", metavar="FILE", help="the page; default routing.html in RUN, or with the adapters"
    )
    parser.add_argument(
        "--samples", type=positive, default=200, metavar="N", help="images to make; default 200"
    )
    parser.add_argument(
        "--classes",
        type=_classes,
        metavar="N|LIST",
        help="only the first N (captions), or a list, such as cat,dog or 3-5; default all",
    )
    add_labels(parser)
    add_sampling(parser, PREVIEW_STEPS)
    add_capacity(parser)
    add_data(parser, "to compare the capacity predictor with training on")
    add_batch(parser)
    add_device(parser)
    add_dtype(parser)
    add_decoder(parser)
    add_prompts(parser)
    return parser.parse_args()


def _classes(text: str) -> int | str:
    return positive(text) if text.isdecimal() else text


def main() -> None:
    options = parse()
    from diffmoe.parallel.device import setup_device
    from diffmoe.routing_report.report import write_report
    from diffmoe.sampling.classes import class_numbers
    from diffmoe.sampling.passes import noise_passes
    from diffmoe.work import ensure_writable

    out = Path(options.out or Path(options.adapters or options.run) / "routing.html")
    sampler = open_sampler(options, setup_device(options.device)).with_capacity(options.capacity)
    ensure_writable(out.parent)
    settings = sampler.fitted(settings_of(options), say)
    classes: Sequence[int] = range(sampler.choices)
    if isinstance(options.classes, int):
        classes = classes[: options.classes]
    elif options.classes:
        names = () if sampler.prompts else sampler.model.class_names
        classes = class_numbers(options.classes, names, sampler.model.path)
    request = sampler.request(options.samples, options.labels, classes)
    passes, config = None, data_config(options, sampler.config)
    has_data = options.data or (config.data.path and Path(config.data.path).is_dir())
    if sampler.network.has_predictors and has_data:
        passes = noise_passes(sampler.network, config, options.samples, options.batch, options.seed)
    title = f"Experts of {sampler.model.title}"
    found = write_report(sampler, out, title, request, settings, batch=options.batch, passes=passes)
    note = sampler.calibration_note(settings, found.capacity)
    if note:
        say(note)
    dead = found.dead_experts()
    print(f"capacity {found.capacity.average:.3f}, {len(dead)} dead experts {dead or ''}: {out}")


if __name__ == "__main__":
    run_command(main)
