"""One batch of latents from a network: labels and image numbers in, latents out.

Labels of a text model are numbers of its captions (text.prompts.Prompts).
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from diffmoe.capacity.forward import Forward, Observer
from diffmoe.conditions import Condition
from diffmoe.config import Config
from diffmoe.diffusion.ddpm import GaussianDiffusion
from diffmoe.diffusion.guidance import guided
from diffmoe.diffusion.samplers import Progress, SampleNoise, sample_ddpm, sample_flow
from diffmoe.diffusion.settings import SamplingSettings, t_of, time_of
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.text.prompts import NO_PROMPT, Prompts, conditions


def can_guide(config: Config, prompts: Prompts | None) -> bool:
    """Whether training has shown the model what guidance leads away from."""
    has_negative = prompts is not None and prompts.negative is not None
    return has_negative or config.training.label_dropout > 0


def check_guidance(config: Config, settings: SamplingSettings, prompts: Prompts | None) -> None:
    """Raise UserError for guidance away from a condition that the model was not trained with."""
    if settings.guidance != 1 and not can_guide(config, prompts):
        way_out = "" if prompts is None else ", or give a negative prompt"
        raise UserError(
            f"guidance {settings.guidance:g}: the model was trained with training.label_dropout=0 "
            f"and has no unconditional prediction to guide away from; use guidance 1{way_out}"
        )


def check_sampling(
    network: DiT,
    config: Config,
    labels: Iterable[int],
    settings: SamplingSettings,
    prompts: Prompts | None = None,
) -> None:
    """Raise UserError where settings, labels or prompts do not fit the network."""
    settings.check(config)
    if settings.sampler == "dopri5" and network.topology.expert_parallel > 1:
        raise UserError(
            "dopri5 takes as many evaluations as its samples need, and ranks that share experts "
            "must take equally many; choose heun, or expert parallelism 1"
        )
    check_guidance(config, settings, prompts)
    if config.model.text is not None:
        if prompts is None:
            raise UserError(NO_PROMPT)
        if prompts.negative is not None and settings.guidance == 1:
            raise UserError("a negative prompt acts through guidance; set it above 1")
    classes = config.model.num_classes if prompts is None else len(prompts)
    wrong = next((label for label in labels if not 0 <= label < classes), None)
    if wrong is not None:
        kind = f"class {wrong}" if prompts is None else f"caption number {wrong}"
        of = f"model.num_classes={classes}" if prompts is None else f"{classes} were given"
        raise UserError(f"{kind} is outside 0..{classes - 1} ({of})")


@torch.inference_mode()
def sample_latents(
    network: DiT,
    config: Config,
    labels: Sequence[int],
    indices: Sequence[int],
    settings: SamplingSettings,
    *,
    prompts: Prompts | None = None,
    observe: Observer | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Latents (n, C, H, W), fp32 on the network's device; all that `check_sampling` has passed.

    indices: numbers of the images. Image k has its own noise, keyed (seed, k): with per-token
    routing it is the same in any batch, in any order and on any number of ranks.
    observe: sees every evaluation of the network. progress: gets the fraction that is done.
    Raises UserError where latents are not finite: they would be decoded to black images.
    """
    sampler, guidance = settings.chosen_sampler(config), settings.guidance
    assert guidance is not None  # else settings.check refuses it
    assert settings.shift is not None  # as above
    device = next(network.parameters()).device
    noise = SampleNoise(settings.seed, indices, config.model.latent_shape)
    wanted, null = conditions(labels, config, prompts, device)
    low, high = sorted(t_of(config, time) for time in settings.guidance_interval)

    def evaluate(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        out = network(x, t, condition)
        if observe is not None:
            observe(Forward(time_of(config, t)[0], condition is not wanted, out.routing))
        if sampler == "dopri5":  # on values that are not finite its steps would shrink for ever
            _check_finite(out.prediction, network, indices, settings)
        return out.prediction

    model = guided(
        evaluate,
        wanted,
        null,
        scale=guidance,
        channels=config.model.in_channels,
        guided_channels=settings.guided_channels,
        interval=(low, high) if settings.guidance_interval != (0, 1) else None,
        keep_variance=config.diffusion.objective == "ddpm",
    )
    start = noise.draw().to(device)
    if sampler == "ddpm" or sampler == "ddim":
        latents = sample_ddpm(
            model,
            start,
            GaussianDiffusion(),
            settings.steps,
            draw=noise.draw,
            method=sampler,
            eta=settings.eta,
            progress=progress,
        )
    else:
        latents = sample_flow(
            model,
            start,
            settings.steps,
            sampler,
            settings.shift,
            draw=noise.draw,
            progress=progress,
        )
    _check_finite(latents, network, indices, settings)
    return latents


def _check_finite(
    values: Tensor, network: DiT, indices: Sequence[int], settings: SamplingSettings
) -> None:
    broken_n = ~values.isfinite().flatten(1).all(dim=1)
    if not broken_n.any():
        return
    image = indices[int(broken_n.nonzero()[0])]
    if all(parameter.isfinite().all() for parameter in network.parameters()):
        cause = (
            f"sampling overflowed (guidance {settings.guidance:g}, {settings.steps} steps); lower "
            "the guidance, take more steps, or float32"
        )
    else:
        cause = "the model's weights are not finite; take an earlier checkpoint"
    raise UserError(f"image {image} is not made of finite numbers: {cause}")
