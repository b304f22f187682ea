"""Command-line flags that several tools share, each spelled once. --help imports no torch."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from diffmoe.diffusion.settings import GUIDANCE, SamplingSettings
from diffmoe.errors import UserError

if TYPE_CHECKING:
    import torch

    from diffmoe.config import Config
    from diffmoe.parallel.topology import Topology
    from diffmoe.sampling.sampler import Sampler
    from diffmoe.text.prompts import Prompts


def positive(text: str) -> int:
    """A whole number, at least 1."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN, for `open_sampler`."""
    parser.add_argument(
        "run", metavar="RUN", help="a run's folder, one checkpoint, or a converted model"
    )


def add_weights(parser: argparse._ActionsContainer) -> None:
    """--weights, for `open_sampler`."""
    parser.add_argument("--weights", choices=["ema", "live"], default="ema", help="default ema")


def add_adapters(parser: argparse._ActionsContainer) -> None:
    """--adapters, for `open_sampler`."""
    parser.add_argument(
        "--adapters", metavar="DIR", help="of a LoRA run that was trained on RUN; they are merged"
    )


def add_decoder(parser: argparse._ActionsContainer) -> None:
    """--decoder, for `open_sampler`."""
    parser.add_argument(
        "--decoder",
        metavar="NAME",
        help="in place of the autoencoder that the data name: another of diffusers (folder or hub "
        "id), or code to run: FILE.pt (TorchScript) or package.module:function",
    )


def add_device(parser: argparse._ActionsContainer) -> None:
    """--device, for parallel.device.setup_device."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default cuda where there is one")


def add_dtype(parser: argparse._ActionsContainer) -> None:
    """--dtype, for `open_sampler`."""
    parser.add_argument(
        "--dtype",
        choices=["fp32", "bf16"],
        help="of the network's products; routing, sampler and decoder stay in fp32; default bf16 "
        "on a GPU, fp32 on a CPU",
    )


def add_batch(parser: argparse._ActionsContainer, default: int = 50) -> None:
    """--batch, of images that are sampled."""
    parser.add_argument(
        "--batch",
        type=positive,
        default=default,
        metavar="N",
        help=f"images at a time; default {default}",
    )


def add_expert_parallel(parser: argparse._ActionsContainer) -> None:
    """--expert-parallel, for sampling.sharing.share_experts."""
    parser.add_argument(
        "--expert-parallel",
        type=positive,
        default=1,
        metavar="P",
        help="ranks that share the experts; default 1",
    )


def add_num_samples(parser: argparse.ArgumentParser, help: str, required: bool = False) -> None:
    """--num-samples, for SampleRequest. --num is its short form: torchrun has such an option too,
    and takes a bare --num for an abbreviation of its own."""
    parser.add_argument(
        "--num-samples", "--num", type=positive, metavar="N", required=required, help=help
    )


def add_capacity(parser: argparse._ActionsContainer) -> None:
    """--capacity, for Sampler.with_capacity."""
    parser.add_argument(
        "--capacity",
        type=float,
        metavar="C",
        help="experts that an average token meets, as calibrated by tools/calibrate.py; default: "
        "as in training",
    )


def add_routing(parser: argparse._ActionsContainer) -> None:
    """--routing, for Sampler.with_capacity."""
    parser.add_argument(
        "--routing",
        choices=["per_token", "pooled", "static"],
        help="how experts choose tokens; default: the model's moe.inference, per_token",
    )


def add_data(parser: argparse.ArgumentParser, purpose: str) -> None:
    """--data and --allow-commands, for `data_config`."""
    parser.add_argument("--data", metavar="DIR", help=f"shards {purpose}; default: the run's own")
    add_allow_commands(parser)


def data_config(options: argparse.Namespace, config: Config) -> Config:
    """A run's configuration with the data that the options of `add_data` name and permit.

    A permission that the run was given does not count: its configuration may come from elsewhere.
    """
    path = options.data or config.data.path
    return config.replace({"data.path": path, "data.allow_commands": options.allow_commands})


def add_allow_commands(parser: argparse.ArgumentParser) -> None:
    """The permission that data alone can never give."""
    parser.add_argument(
        "--allow-commands",
        action="store_true",
        help="let the manifest's addresses start programs (pipe:, gs:, hf:, ...): only for data "
        "from somebody you trust",
    )


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """The prompts of a text model and its encoder, for `prompts_of`."""
    group = parser.add_argument_group("text-conditioned models")
    group.add_argument(
        "--prompt", action="append", default=[], metavar="CAPTION", help="may be given repeatedly"
    )
    group.add_argument("--prompts", metavar="FILE", help="text file, one prompt per line")
    group.add_argument("--negative-prompt", metavar="CAPTION", help="guidance leads away from it")
    group.add_argument(
        "--text-encoder",
        metavar="DIR",
        help="folder of the text encoder; a model that reads bytes needs none",
    )


def prompts_of(options: argparse.Namespace, config: Config, device: torch.device) -> Prompts | None:
    """The prompts that the options of `add_prompts` request; None for a model of classes.

    Raises UserError where they do not fit the model, and for a file that cannot be read.
    """
    from diffmoe.text.prompts import create_prompts, encoder_of, read_captions

    captions = list(options.prompt)
    if options.prompts:
        captions += read_captions(options.prompts)
    encoder = encoder_of(config, options.text_encoder, device)
    return create_prompts(config, encoder, captions, options.negative_prompt)


def add_labels(parser: argparse._ActionsContainer) -> None:
    """--labels, for SampleRequest."""
    parser.add_argument(
        "--labels",
        choices=["balanced", "random"],
        default="balanced",
        help="classes or captions in turn, or one drawn for each image as in the paper; default "
        "balanced",
    )


def add_sampling(
    parser: argparse.ArgumentParser,
    steps: int,
    title: str = "how to sample",
    sweep: bool = False,
) -> argparse._ArgumentGroup:
    """The settings of sampling, for `settings_of`. steps: the default. Returns the group.

    sweep: take several guidance scales, for `sweep_of`.
    """
    usual = SamplingSettings()
    how = parser.add_argument_group(title)
    how.add_argument(
        "--seed",
        type=int,
        default=usual.seed,
        help=f"of noise and of drawn labels; default {usual.seed}",
    )
    how.add_argument(
        "--sampler",
        help="euler, heun, dopri5, sde (flow); ddpm, ddim; default euler or ddpm. dopri5 takes "
        "many evaluations of a mixture, whose routing jumps: prefer heun",
    )
    how.add_argument("--steps", type=positive, default=steps, help=f"default {steps}")
    how.add_argument(
        "--guidance",
        type=float,
        nargs="+" if sweep else None,
        help=f"{'one or several; ' if sweep else ''}1: none; default {GUIDANCE:g}, or 1 for a "
        "model trained without label dropout",
    )
    how.add_argument(
        "--guidance-interval",
        type=_times,
        default="0,1",
        metavar="FROM,TO",
        help="times at which guidance acts, 0 is noise and 1 data; outside it costs nothing; "
        "default 0,1",
    )
    how.add_argument(
        "--guided-channels", type=int, metavar="N", help="guide only the first N; default: all"
    )
    how.add_argument(
        "--shift",
        type=float,
        help="over 1: more steps at high noise; default: that of training",
    )
    how.add_argument(
        "--eta", type=float, default=usual.eta, help=f"noise of ddim; default {usual.eta:g}"
    )
    return how


def _times(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--guidance-interval {text}: write numbers with commas, such as 0.2,0.9"
        ) from None


def sweep_of(options: argparse.Namespace) -> list[SamplingSettings]:
    """The options of `add_sampling` with a sweep: settings for each guidance scale."""
    given = vars(options)
    scales = options.guidance or [None]
    return [settings_of(argparse.Namespace(**{**given, "guidance": scale})) for scale in scales]


def settings_of(options: argparse.Namespace) -> SamplingSettings:
    """The options of `add_sampling`; where they leave guidance open, Sampler.fitted chooses."""
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


def open_sampler(
    options: argparse.Namespace,
    device: torch.device,
    topology: Topology | None = None,
    *,
    with_autoencoder: bool = True,
    with_prompts: bool = True,
) -> Sampler:
    """The model RUN with its prompts. A tool without --weights takes those of the EMA, and one
    without --dtype fp32.

    with_autoencoder, with_prompts: False where neither images nor captions are needed.
    """
    from diffmoe.parallel.device import default_dtype
    from diffmoe.sampling.sampler import Sampler

    dtype = (options.dtype or default_dtype(device)) if "dtype" in options else "fp32"
    decoder = getattr(options, "decoder", None)
    sampler = Sampler.open(
        options.run,
        getattr(options, "weights", "ema"),
        topology=topology,
        device=device,
        dtype=dtype,
        with_autoencoder=with_autoencoder and decoder is None,
        adapters=getattr(options, "adapters", None),
    )
    if with_autoencoder:
        sampler = sampler.with_decoder(decoder)
    if with_prompts:
        sampler = replace(sampler, prompts=prompts_of(options, sampler.config, device))
    return sampler


def say(text: str) -> None:
    """Print a note on stderr, on the first rank; stdout is for a tool's result."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr)
