"""The random part of a training batch, keyed by (seed, clock, lane): the same on any ranks."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.conditions import Condition, unconditional
from diffmoe.config import Config
from diffmoe.data.stream import Batch
from diffmoe.diffusion import Objective
from diffmoe.seeding import keyed_generator
from diffmoe.tree import tree_map


class Examples(NamedTuple):
    """Noised samples of one micro-batch, ready for the network and the loss.

    features: those of the batch, where there is something to align.
    """

    data: Tensor
    noise: Tensor
    x_t: Tensor
    t: Tensor
    condition: Condition
    features: Tensor | None = None

    @property
    def inputs(self) -> tuple:
        """Arguments of the network's forward; with features it is asked for projected tokens."""
        given = (self.x_t, self.t, self.condition)
        return given if self.features is None else (*given, True)


def micro_batches(
    batch: Batch, config: Config, lanes: range, clock: int, objective: Objective
) -> list[Examples]:
    """Draw timesteps, label or caption dropout, and noise for one rank's batch of one step.

    Each (seed, clock, lane) has one generator for the lane's n samples. Micro-batch m of A takes
    the m-th part of every lane, so that a token pool over all ranks holds the same samples on any
    number of ranks.
    """
    n, parts = config.samples_per_lane, config.training.accumulation
    shape = batch.latents.shape[1:]
    t, dropped, noise = [], [], []
    for lane in lanes:
        generator = keyed_generator(config.seed, "example", clock, lane)
        t.append(objective.sample_timesteps(n, generator))
        dropped.append(torch.rand(n, generator=generator) < config.training.label_dropout)
        noise.append(torch.randn(n, *shape, generator=generator))
    condition = batch.labels if batch.text is None else batch.text
    condition = unconditional(condition, torch.cat(dropped), config.model.num_classes)

    def part(tensor: Tensor, m: int) -> Tensor:
        by_part = tensor.view(len(lanes), parts, n // parts, *tensor.shape[1:])
        return by_part[:, m].flatten(0, 1)

    examples = []
    all_noise, all_t = torch.cat(noise), torch.cat(t)
    for m in range(parts):
        data, eps, times = (part(tensor, m) for tensor in (batch.latents, all_noise, all_t))
        x_t = objective.corrupt(data, eps, times)
        own = tree_map(partial(part, m=m), condition)
        features = tree_map(partial(part, m=m), batch.features)
        examples.append(Examples(data, eps, x_t, times, own, features))
    return examples
