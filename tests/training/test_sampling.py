"""Sampling from a network: keyed by seed and image, whatever the batch."""

import pytest
import torch
from torch import Tensor

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.sampling import sample_latents
from tests.tiny import randomize, tiny_config


def network_of(config: Config) -> DiT:
    network = randomize(DiT(config.model, config.moe))
    for layer in network.moe_layers:
        layer.capacity_predictor.thresholds.fill_(0.5)  # about half of the pairs
    return network.eval()


CONFIG = tiny_config()
LABELS = [0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_an_image_does_not_depend_on_its_batch(guidance: float):
    network = network_of(CONFIG)

    def sample(first: int, count: int) -> Tensor:
        labels = LABELS[first : first + count]
        return sample_latents(
            network, CONFIG, labels, seed=3, first_index=first, steps=5, guidance=guidance
        )

    together = sample(0, 6)
    assert together.shape == (6, 2, 8, 8)
    for size in (1, 2, 3):
        parts = torch.cat([sample(first, size) for first in range(0, 6, size)])
        # Products of other row counts round differently, in fp32.
        torch.testing.assert_close(parts, together, atol=1e-5, rtol=0)


def test_samples_are_reproducible_by_seed():
    network = network_of(CONFIG)
    first, again, other = (
        sample_latents(network, CONFIG, [1, 1], seed=seed, steps=3) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1
    assert (first[0] - first[1]).abs().max() > 0.1  # each image has noise of its own


def test_ddpm_samples_with_the_learned_variance():
    config = tiny_config(diffusion__objective="ddpm", model__learn_sigma=True)
    network = network_of(config)
    together = sample_latents(network, config, [0, 1, 2], seed=5, steps=10, guidance=1.5)
    alone = sample_latents(network, config, [2], seed=5, first_index=2, steps=10, guidance=1.5)
    assert together.shape == (3, 2, 8, 8)
    assert together.isfinite().all()
    torch.testing.assert_close(alone, together[2:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("guidance", "images"), [(1.0, 3), (2.0, 6)])
def test_without_guidance_each_step_costs_one_forward(guidance: float, images: int):
    network, seen = network_of(CONFIG), []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    sample_latents(network, CONFIG, [0, 1, 2], steps=4, guidance=guidance)
    assert sum(seen) == 4 * images


@pytest.mark.parametrize("label", [-1, 5])
def test_a_class_that_is_not_there_is_refused(label: int):
    with pytest.raises(UserError, match=rf"class {label} is outside 0\.\.4 .*num_classes=5"):
        sample_latents(network_of(CONFIG), CONFIG, [0, label], steps=1)
