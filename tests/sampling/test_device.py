"""Sampling on a GPU gives the images of a CPU, by every sampler and way of routing."""

import pytest
import torch

from diffmoe.diffusion.settings import SamplingSettings
from tests.helpers.devices import GPU
from tests.helpers.networks import CONFIG, DDPM, network_of
from tests.helpers.sampling import latents_of
from tests.helpers.tiny import tiny_config

WAYS = {
    "euler": (CONFIG, "euler"),
    "heun": (CONFIG, "heun"),
    "sde": (CONFIG, "sde"),
    "ddpm": (DDPM, "ddpm"),
    "ddim": (DDPM, "ddim"),
    **{
        inference: (tiny_config(moe__inference=inference), "euler")
        for inference in ("pooled", "static")
    },
    **{
        family: (tiny_config(moe__type=family, **changes), "euler")
        for family, changes in {
            "expert_choice": {},
            "token_choice": {"moe__top_k": 2},
            "race": {},
            "promoe": {},
            "dsmoe": {"moe__top_k": 2},
            "dense": {},
        }.items()
    },
}


@pytest.mark.parametrize("place", [pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("way", WAYS)
def test_latents_are_those_of_a_cpu(way: str, place: str):
    config, sampler = WAYS[way]
    settings = SamplingSettings(steps=4, guidance=1.5, seed=2, sampler=sampler)
    network = network_of(config)
    expected = latents_of(network, config, [0, 1, 2], [3, 4, 5], settings)
    found = latents_of(network.to(place), config, [0, 1, 2], [3, 4, 5], settings)
    scale = expected.abs().max()
    # Sums in another order, through four blocks and up to eight evaluations.
    torch.testing.assert_close(found.cpu() / scale, expected / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize("place", [pytest.param("cuda", marks=GPU)])
def test_an_image_on_a_gpu_does_not_depend_on_its_batch(place: str):
    network = network_of(CONFIG).to(place)
    settings = SamplingSettings(steps=4, guidance=1.5, seed=2)
    together = latents_of(network, CONFIG, [0, 1, 2], [3, 4, 5], settings)
    for at, image in enumerate([3, 4, 5]):
        alone = latents_of(network, CONFIG, [at], [image], settings)
        # Products of other sizes round otherwise.
        torch.testing.assert_close(alone[0], together[at], atol=1e-4, rtol=1e-4)
