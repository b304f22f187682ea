"""Find the thresholds with which a run's experts do a wanted amount of work.

  python tools/calibrate.py runs/mnist --capacity 0.8 0.5
  python tools/sample.py runs/mnist --capacity 0.8

Capacity C is the number of experts that an average token meets: 1 is what training gives, less is
quicker, more is often better. The thresholds are stored in the checkpoint's folder, under C's name.
They are found along the sampling trajectory, with the sampler, steps and guidance given here, which
are stored with them: sample with the same, since C moves with them (at C = 0.1 by up to a third).
Or with --over noise on real data at the noise levels of training.
"""

import argparse

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
    parser.add_argument("--capacity", type=float, nargs="+", required=True, metavar="C")
    parser.add_argument(
        "--over", choices=["trajectory", "noise"], default="trajectory", help="default trajectory"
    )
    parser.add_argument(
        "--common",
        action="store_true",
        help="one threshold for all experts; default each expert works equally much",
    )
    parser.add_argument("--samples", type=positive, default=256, help="to look at; default 256")
    parser.add_argument("--batch", type=positive, default=64, help="samples at a time; default 64")
    parser.add_argument("--data", metavar="DIR", help="of --over noise; default the run's own")
    parser.add_argument("--weights", choices=["ema", "live"], default="ema", help="default ema")
    add_labels(parser)
    add_sampling(parser, 50, "how the trajectory is sampled")
    add_device(parser)
    add_allow_commands(parser)
    add_prompts(parser)
    return parser.parse_args()


def main() -> None:
    options = parse()
    from diffmoe.capacity.calibration import calibrate
    from diffmoe.capacity.thresholds import Calibrated, name_of, store
    from diffmoe.export.open import locate, open_network, weights_of
    from diffmoe.parallel.device import setup_device
    from diffmoe.sampling.latents import fitted
    from diffmoe.sampling.many_images import SampleRequest
    from diffmoe.sampling.passes import noise_passes, trajectory_passes
    from diffmoe.work import ensure_writable

    device = setup_device(options.device)
    folder = locate(options.run)
    weights = weights_of(folder, options.weights)
    ensure_writable(folder)
    snapshot = open_network(folder, weights, device=device)
    network, config = snapshot.network, snapshot.config
    settings = None
    if options.over == "noise":
        if options.data:
            config = config.replace({"data.path": options.data})
        config = config.replace({"data.allow_commands": options.allow_commands})
        passes = noise_passes(network, config, options.samples, options.batch, options.seed)
    else:
        prompts = prompts_of(options, config, device)
        kinds = config.model.num_classes if prompts is None else len(prompts)
        settings = fitted(settings_of(options), config, prompts, say)
        order = SampleRequest(options.samples, tuple(range(kinds)), options.labels)
        labels = [order.label(k, options.seed) for k in range(options.samples)]
        passes = trajectory_passes(network, config, labels, options.batch, settings, prompts)
    for capacity in options.capacity:
        log_odds_LE, measured = calibrate(
            network, capacity, passes, common=options.common, report=print
        )
        entry = Calibrated(
            weights=weights,
            capacity=capacity,
            measured=measured,
            common=options.common,
            over=options.over,
            samples=options.samples,
            sampling=settings,
            labels=options.labels,
            log_odds=log_odds_LE.tolist(),
        )
        store(folder, name_of(capacity), entry)
        print(f"capacity {measured:.3f} stored as {name_of(capacity)} in {folder}")


if __name__ == "__main__":
    run_command(main)
