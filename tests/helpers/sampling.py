"""Sampling from networks that were not opened from a path."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from diffmoe.capacity.forward import Observer
from diffmoe.capacity.thresholds import CapacityChoice, choose_capacity
from diffmoe.config import Config
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.models.dit import DiT
from diffmoe.sampling.sampler import Sampler
from diffmoe.text.prompts import Prompts


def latents_of(
    network: DiT,
    config: Config,
    labels: Sequence[int],
    indices: Sequence[int],
    settings: SamplingSettings,
    *,
    prompts: Prompts | None = None,
    observe: Observer | None = None,
) -> Tensor:
    sampler = Sampler(network, config, prompts=prompts)
    return sampler.latents(labels, settings, indices=indices, observe=observe)


def set_capacity(network: DiT, folder: Path, *arguments, **options) -> CapacityChoice:
    """Choose, and leave the network routing that way."""
    choice = choose_capacity(network, folder, *arguments, **options)
    if choice.mode is not None:
        network.routing = choice.mode
    return choice
