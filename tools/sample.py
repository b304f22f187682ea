"""Sample images from a run, in one process, from a checkpoint of any number of ranks.

  python tools/sample.py runs/mnist --classes 0,1,2,3 --per-class 5 --guidance 2 --out grid.png

RUN is a run's folder (its newest checkpoint is taken) or one checkpoint. Image k of a seed has a
noise of its own, so it does not depend on --batch.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from diffmoe.checkpoints.folder import complete
from diffmoe.checkpoints.network import load_network
from diffmoe.data.autoencoder import autoencoder_of
from diffmoe.errors import UserError, run_command
from diffmoe.evaluation.digits import digit_agreement
from diffmoe.sampling import sample_latents


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a run's folder, or a checkpoint step-XXXXXXXX in it")
    parser.add_argument("--classes", default="0", help="comma-separated class numbers; default 0")
    parser.add_argument("--per-class", type=int, default=10, help="images of each; default 10")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=250, help="sampler steps; default 250")
    parser.add_argument("--guidance", type=float, default=1.5, help="1: none; default 1.5")
    parser.add_argument("--weights", choices=["ema", "live"], default="ema")
    parser.add_argument("--batch", type=int, default=50, help="images at a time; default 50")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", default="grid.png", help="the picture; one row per class")
    parser.add_argument(
        "--check-digits",
        action="store_true",
        help="for MNIST: print how many samples a classifier of real digits recognises",
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    snapshot = load_network(complete(arguments.run), arguments.weights)
    network = snapshot.network.to(arguments.device)
    try:
        classes = [int(text) for text in arguments.classes.split(",")]
    except ValueError:
        raise UserError(f"--classes {arguments.classes}: write numbers, such as 0,1,2") from None
    labels = [label for label in classes for _ in range(arguments.per_class)]
    parts = []
    with tqdm(total=len(labels), unit="image", disable=None) as bar:
        for start in range(0, len(labels), arguments.batch):
            batch = labels[start : start + arguments.batch]
            parts.append(
                sample_latents(
                    network,
                    snapshot.config,
                    batch,
                    seed=arguments.seed,
                    first_index=start,
                    steps=arguments.steps,
                    guidance=arguments.guidance,
                    progress=partial(_show, bar, start, len(batch)),
                )
            )
    images = autoencoder_of(snapshot.latents, arguments.device).decode(torch.cat(parts)).cpu()
    n, height, width, channels = images.shape
    rows = images.view(len(classes), -1, height, width, channels).permute(0, 2, 1, 3, 4)
    picture = rows.reshape(len(classes) * height, -1, channels).squeeze(-1).numpy()
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(arguments.out)
    print(f"{n} samples at {snapshot.clock['samples']} training samples: {arguments.out}")
    if arguments.check_digits:
        share = digit_agreement(images.numpy(), torch.tensor(labels).numpy())
        print(f"a 5-nearest-neighbour classifier of real digits agrees with {share:.1%} of {n}")


def _show(bar: tqdm, start: int, size: int, done: float) -> None:
    """A batch counts as images in proportion to its finished steps."""
    bar.update(round(start + done * size) - bar.n)


if __name__ == "__main__":
    run_command(main)
