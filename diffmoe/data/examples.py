"""The random part of a training batch: keyed by (seed, clock, lane), the same on any ranks."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.config import Config
from diffmoe.data.shards import Batch
from diffmoe.diffusion import Objective
from diffmoe.seeding import keyed_generator


class Examples(NamedTuple):
    """Noised samples of one micro-batch, ready for the network and the loss."""

    data: Tensor
    noise: Tensor
    x_t: Tensor
    t: Tensor
    labels: Tensor


def micro_batches(
    batch: Batch, config: Config, lanes: range, clock: int, objective: Objective
) -> list[Examples]:
    """Draw timesteps, label dropout and noise for one rank's batch of one optimizer step.

    One generator per (seed, clock, lane) serves the lane's n samples. Micro-batch m of A takes the
    m-th part of every lane, so a pool over all ranks holds the same samples on any number of them.
    """
    n, parts = config.samples_per_lane, config.training.accumulation
    shape = batch.latents.shape[1:]
    t, dropped, noise = [], [], []
    for lane in lanes:
        generator = keyed_generator(config.seed, "example", clock, lane)
        t.append(objective.sample_timesteps(n, generator))
        dropped.append(torch.rand(n, generator=generator) < config.training.label_dropout)
        noise.append(torch.randn(n, *shape, generator=generator))
    labels = torch.where(torch.cat(dropped), config.model.num_classes, batch.labels)

    def split(tensor: Tensor) -> list[Tensor]:
        by_part = tensor.view(len(lanes), parts, n // parts, *tensor.shape[1:]).transpose(0, 1)
        return list(by_part.flatten(1, 2))

    examples = []
    columns = (batch.latents, torch.cat(noise), torch.cat(t), labels)
    for data, eps, times, classes in zip(*map(split, columns), strict=True):
        x_t = objective.corrupt(data, eps, times)
        examples.append(Examples(data, eps, x_t, times, classes))
    return examples
