"""Command-line arguments that several tools share. Imports no torch, so that --help is quick."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from diffmoe.config import Config
    from diffmoe.inference.prompts import Prompts


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
    """--device, for parallel.device.own_device."""
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
    from diffmoe.inference.prompts import asked, encoder_of, read_captions

    captions = list(options.prompt)
    if options.prompts:
        captions += read_captions(options.prompts)
    encoder = encoder_of(config, options.text_encoder, device)
    return asked(config, encoder, captions, options.negative_prompt)
