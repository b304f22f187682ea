"""See what the experts of a run do: one HTML page, with all its figures inside.

  python tools/report_routing.py runs/mnist --out runs/mnist/routing.html

Samples images with the EMA weights and looks at every evaluation: compute by time, layer, expert,
class (or caption) and place in the image, tokens that no expert takes, experts that take the same
tokens, dead experts. With the run's data at hand (or --data DIR) also how well the capacity
predictor foretells the selection of training.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from diffmoe.cli import (
    add_allow_commands,
    add_device,
    add_labels,
    add_prompts,
    add_sampling,
    positive,
    prompts_of,
    say,
    settings_of,
)
from diffmoe.errors import run_command


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run", metavar="RUN", help="a run's folder, one checkpoint, or a converted model"
    )
    parser.add_argument("--out", metavar="FILE", help="the page; default RUN/routing.html")
    parser.add_argument("--samples", type=positive, default=200, help="images to make; default 200")
    parser.add_argument(
        "--classes",
        type=_classes,
        metavar="N|LIST",
        help="the first N (captions) only, or a list, such as cat,dog or 3,5; default all",
    )
    add_labels(parser)
    add_sampling(parser, 50)
    parser.add_argument("--capacity", type=float, metavar="C", help="default: as in training")
    parser.add_argument("--data", metavar="DIR", help="shards for the predictor; default the run's")
    parser.add_argument("--batch", type=positive, default=50, help="images at a time; default 50")
    add_device(parser)
    add_allow_commands(parser)
    add_prompts(parser)
    return parser.parse_args()


def _classes(text: str) -> int | str:
    return positive(text) if text.isdecimal() else text


def main() -> None:
    options = parse()
    from tqdm import tqdm

    from diffmoe.capacity.meter import activated_parameters
    from diffmoe.capacity.thresholds import set_capacity
    from diffmoe.data.autoencoders import autoencoder_of
    from diffmoe.export.open import locate, open_network, weights_of
    from diffmoe.parallel.device import setup_device
    from diffmoe.routing_report.analysis import predictor_accuracy, sampling_routing
    from diffmoe.routing_report.page import write_page
    from diffmoe.sampling.classes import class_numbers
    from diffmoe.sampling.latents import fitted
    from diffmoe.sampling.many_images import SampleRequest
    from diffmoe.sampling.passes import noise_passes
    from diffmoe.work import ensure_writable

    device = setup_device(options.device)
    folder = locate(options.run)
    out = Path(options.out or Path(options.run) / "routing.html")
    ensure_writable(out.parent)
    weights = weights_of(folder, "ema")
    snapshot = open_network(folder, weights, device=device)
    network, config = snapshot.network, snapshot.config
    calibrated = set_capacity(network, folder, capacity=options.capacity, weights=weights)

    accuracy = None
    data = options.data or config.data.path
    if network.has_thresholds and (options.data or (data and Path(data).is_dir())):
        config = config.replace({"data.path": data, "data.allow_commands": options.allow_commands})
        passes = noise_passes(network, config, options.samples, options.batch, options.seed)
        accuracy = predictor_accuracy(network, passes)

    prompts = prompts_of(options, config, device)
    kinds = config.model.num_classes if prompts is None else len(prompts)
    settings = fitted(settings_of(options), config, prompts, say)
    classes: Sequence[int] = range(kinds)
    if isinstance(options.classes, int):
        classes = classes[: options.classes]
    elif options.classes:
        names = () if prompts else snapshot.class_names
        classes = class_numbers(options.classes, names, folder)
    order = SampleRequest(options.samples, tuple(classes), options.labels)
    labels = [order.label(k, options.seed) for k in range(options.samples)]
    with tqdm(total=len(labels), unit="image", dynamic_ncols=True, disable=None) as bar:
        routing = sampling_routing(
            network,
            config,
            autoencoder_of(snapshot.latents, device).decode,
            labels,
            settings,
            prompts=prompts,
            batch=options.batch,
            progress=lambda done: bar.update(round(done) - bar.n),
        )
    average = routing.capacity.average
    write_page(
        out,
        f"Experts of {options.run}",
        {
            "trained on": f"{snapshot.clock.samples:,} samples",
            "capacity C": f"{average:.3f}",
            "parameters at work": f"{activated_parameters(network, average) / 1e6:.2f} million",
            "of all": f"{network.parameter_count() / 1e6:.2f} million",
            "sampled": f"{len(labels)} images, {settings.steps} steps, "
            f"guidance {settings.guidance}",
        },
        routing,
        accuracy,
        prompts and prompts.captions,
    )
    differing = calibrated and calibrated.differs(settings, config, average)
    if differing:
        say(differing)
    dead = routing.dead_experts()
    print(f"capacity {average:.3f}, {len(dead)} dead experts {dead or ''}: {out}")


if __name__ == "__main__":
    run_command(main)
