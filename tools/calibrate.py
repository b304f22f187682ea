"""Find the thresholds with which a run's experts do a requested amount of work.

  python tools/calibrate.py runs/mnist --capacity 0.8 0.5
  python tools/sample.py runs/mnist --capacity 0.8

Capacity C is the number of experts that an average token meets: 1 is what training gives, less is
faster, more is often better. The thresholds are stored in the checkpoint's folder (with --adapters
in theirs), under C's name. They are found on the sampling trajectory, with the sampler, steps and
guidance given here, which are stored with them: sample with the same ones, since C changes with
them (at C = 0.1 by up to a third). With --over noise they are found on real data at the noise
levels of training.
"""

import argparse

from diffmoe.cli import (
    add_adapters,
    add_batch,
    add_data,
    add_device,
    add_dtype,
    add_labels,
    add_prompts,
    add_run,
    add_sampling,
    add_weights,
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
    parser.add_argument(
        "--capacity", type=float, nargs="+", required=True, metavar="C", help="one or several"
    )
    parser.add_argument(
        "--over", choices=["trajectory", "noise"], default="trajectory", help="default trajectory"
    )
    parser.add_argument(
        "--common",
        action="store_true",
        help="one threshold for all experts; default: each expert does an equal share",
    )
    parser.add_argument(
        "--samples", type=positive, default=256, metavar="N", help="to calibrate on; default 256"
    )
    add_batch(parser, 64)
    add_weights(parser)
    add_adapters(parser)
    add_labels(parser)
    add_sampling(parser, PREVIEW_STEPS, "how the trajectory is sampled")
    add_device(parser)
    add_dtype(parser)
    add_data(parser, "for --over noise")
    add_prompts(parser)
    return parser.parse_args()


def main() -> None:
    options = parse()
    from diffmoe.capacity.calibration import calibrate
    from diffmoe.capacity.thresholds import Calibrated, name_of, store
    from diffmoe.parallel.device import setup_device
    from diffmoe.sampling.passes import noise_passes, trajectory_passes
    from diffmoe.work import ensure_writable

    on_trajectory = options.over == "trajectory"
    device = setup_device(options.device)
    sampler = open_sampler(options, device, with_autoencoder=False, with_prompts=on_trajectory)
    network, folder, weights = sampler.network, sampler.model.calibrated_in, sampler.model.weights
    ensure_writable(folder)
    if on_trajectory:
        settings = sampler.fitted(settings_of(options), say)
        labels = sampler.request(options.samples, options.labels).all_labels(options.seed)
        passes = trajectory_passes(sampler, labels, options.batch, settings)
    else:
        settings, config = None, data_config(options, sampler.config)
        passes = noise_passes(network, config, options.samples, options.batch, options.seed)
    for capacity in options.capacity:
        thresholds_LE, measured = calibrate(
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
            dtype=sampler.dtype,
            log_odds=thresholds_LE.tolist(),
        )
        store(folder, name_of(capacity), entry)
        print(f"capacity {measured:.3f} stored as {name_of(capacity)} in {folder}")


if __name__ == "__main__":
    run_command(main)
