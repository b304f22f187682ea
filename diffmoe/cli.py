"""Command-line arguments that several tools share. Imports no torch, so that --help is quick."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from diffmoe.errors import UserError

if TYPE_CHECKING:
    import torch

    from diffmoe.config import Config
    from diffmoe.diffusion.settings import SamplingSettings
    from diffmoe.text.prompts import Prompts


def positive(text: str) -> int:
    """A whole number, at least 1."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def add_allow_commands(parser: argparse.ArgumentParser) -> None:
    """The permission that data alone can never give."""
    parser.add_argument(
        "--allow-commands",
        action="store_true",
        help="let the manifest's addresses start programs (pipe:, gs:, hf:, ...): only for data "
        "whose maker you trust",
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    """--device, for parallel.device.setup_device."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default cuda where there is one")


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """What a text model is asked for, and how it is read."""
    group = parser.add_argument_group("of a text model")
    group.add_argument(
        "--prompt", action="append", default=[], metavar="CAPTION", help="may be given repeatedly"
    )
    group.add_argument("--prompts", metavar="FILE", help="captions, one a line")
    group.add_argument("--negative-prompt", metavar="CAPTION", help="guidance leads away from it")
    group.add_argument(
        "--text-encoder", metavar="DIR", help="its folder; a model that reads bytes needs none"
    )


def prompts_of(options: argparse.Namespace, config: Config, device: torch.device) -> Prompts | None:
    """What the options of `add_prompts` ask for; None of a model of classes.

    Raises UserError where they do not fit the model, and for a file that cannot be read.
    """
    from diffmoe.text.prompts import asked, encoder_of, read_captions

    captions = list(options.prompt)
    if options.prompts:
        captions += read_captions(options.prompts)
    encoder = encoder_of(config, options.text_encoder, device)
    return asked(config, encoder, captions, options.negative_prompt)


def add_labels(parser: argparse._ActionsContainer) -> None:
    """--labels, for generation.Order."""
    parser.add_argument(
        "--labels",
        choices=["balanced", "random"],
        default="balanced",
        help="classes or captions in turn, or drawn for each image as the paper does; default "
        "balanced",
    )


def add_sampling(
    parser: argparse.ArgumentParser, steps: int, title: str = "how to sample"
) -> argparse._ArgumentGroup:
    """How samples are made, for `settings_of`. steps: the default. Returns the group."""
    how = parser.add_argument_group(title)
    how.add_argument("--seed", type=int, default=0, help="of noise and drawn labels; default 0")
    how.add_argument(
        "--sampler",
        help="euler, heun, dopri5, sde (flow); ddpm, ddim. dopri5 takes many evaluations of a "
        "mixture, whose routing jumps: rather take heun",
    )
    how.add_argument("--steps", type=positive, default=steps, help=f"default {steps}")
    how.add_argument(
        "--guidance",
        type=float,
        help="1: none; default 1.5, or 1 of a model trained without label dropout",
    )
    how.add_argument(
        "--guidance-interval",
        type=_times,
        default="0,1",
        metavar="FROM,TO",
        help="times at which guidance acts, 0 is noise and 1 data; outside it costs nothing; "
        "default 0,1",
    )
    how.add_argument("--guided-channels", type=int, help="guide the first ones alone; default all")
    how.add_argument(
        "--shift", type=float, default=1.0, help="over 1: more steps at high noise; default 1"
    )
    how.add_argument("--eta", type=float, default=0.0, help="noise of ddim; default 0")
    return how


def _times(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--guidance-interval {text}: write numbers with commas, such as 0.2,0.9"
        ) from None


def settings_of(options: argparse.Namespace) -> SamplingSettings:
    """What the options of `add_sampling` say; the guidance may be left to sampling.fitted."""
    from diffmoe.diffusion.settings import SamplingSettings

    return SamplingSettings(
        sampler=options.sampler,
        steps=options.steps,
        guidance=options.guidance,
        guidance_interval=options.guidance_interval,
        guided_channels=options.guided_channels,
        shift=options.shift,
        eta=options.eta,
        seed=options.seed,
    )


def say(text: str) -> None:
    """On stderr, beside what a tool prints as its result."""
    print(text, file=sys.stderr)
