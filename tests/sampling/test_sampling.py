"""Sampling from a network: keyed by seed and image, whatever the batch and the ranks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from diffmoe.capacity.forward import Forward
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.parallel.topology import create_topology
from diffmoe.sampling.sampler import Sampler
from diffmoe.text.prompts import create_prompts, encoder_of
from tests.helpers.networks import CONFIG, DDPM, network_of
from tests.helpers.ranks import run_ranks
from tests.helpers.sampling import latents_of
from tests.helpers.tiny import BYTES, tiny_config

LABELS = [0, 1, 2, 3, 4, 0]
SETTINGS = [
    SamplingSettings(steps=5, guidance=2.0, seed=3),
    SamplingSettings(steps=5, sampler="heun", shift=2.0, seed=3),
    SamplingSettings(steps=5, sampler="sde", guidance=2.0, guidance_interval=(0.3, 0.7), seed=3),
]


class Pairs:
    """An observer that keeps which expert took which token of which sample, by evaluation."""

    def __init__(self) -> None:
        self.taken: list[Tensor] = []

    def __call__(self, forward: Forward) -> None:
        selected_LES = torch.stack([layer.selected_ES for layer in forward.routing])
        self.taken.append(selected_LES.unflatten(2, (-1, 16)))  # (L, E, B, T)


def sampled(
    network, config, indices: list[int], settings: SamplingSettings
) -> tuple[Tensor, Tensor]:
    """Latents, and all token-expert pairs (evaluations, L, E, B, T)."""
    pairs = Pairs()
    labels = [LABELS[index] for index in indices]
    latents = latents_of(network, config, labels, indices, settings, observe=pairs)
    return latents, torch.stack(pairs.taken)


@pytest.mark.parametrize(
    ("sampler", "shift"), [("euler", 3.0), ("heun", 3.0), ("sde", 3.0), ("dopri5", 1.0)]
)
def test_a_shift_that_nobody_chose_is_that_of_training(sampler, shift):
    config = CONFIG.replace({"diffusion.timestep_shift": 3.0})
    left_open = SamplingSettings(sampler=sampler, steps=3, guidance=2.0, shift=None)
    assert left_open.with_shift_of(config) == replace(left_open, shift=shift)
    assert left_open.with_shift_of(CONFIG).shift == 1
    assert left_open.with_shift_of(DDPM.replace({"seed": 1})).shift == 1
    chosen = replace(left_open, shift=2.0)
    assert chosen.with_shift_of(config) == chosen
    with pytest.raises(ValueError, match="left open"):
        left_open.check(config)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: s.sampler or "euler")
def test_an_image_does_not_depend_on_its_batch_or_order(settings):
    network = network_of(CONFIG)
    together, pairs = sampled(network, CONFIG, [0, 1, 2, 3, 4, 5], settings)
    assert together.shape == (6, 2, 8, 8)
    assert 0.3 < pairs.double().mean() < 0.7
    for indices in ([0], [5, 2], [4, 3, 1]):
        alone, own_pairs = sampled(network, CONFIG, indices, settings)
        # Products of other row counts round differently, in fp32.
        torch.testing.assert_close(alone, together[indices], atol=1e-5, rtol=0)
        assert torch.equal(own_pairs, pairs[:, :, :, indices])


def _sampled_on_a_rank(expert_parallel: int, settings: SamplingSettings):
    import torch.distributed as dist

    network = network_of(CONFIG, create_topology(expert_parallel))
    mine = [[0, 1, 2], [3, 4, 5]][dist.get_rank()]
    return sampled(network, CONFIG, mine, settings)


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_two_ranks_sample_what_one_does(expert_parallel: int):
    settings = SETTINGS[2]
    together, pairs = sampled(network_of(CONFIG), CONFIG, [0, 1, 2, 3, 4, 5], settings)
    parts = run_ranks(2, _sampled_on_a_rank, expert_parallel, settings)
    torch.testing.assert_close(torch.cat([part for part, _ in parts]), together, atol=1e-5, rtol=0)
    assert torch.equal(torch.cat([own for _, own in parts], dim=3), pairs)


def test_pooled_routing_does_depend_on_the_batch():
    network = network_of(CONFIG)  # so the test above means something
    network.route_by("pooled")
    together, _ = sampled(network, CONFIG, [0, 1, 2, 3], SETTINGS[0])
    alone, _ = sampled(network, CONFIG, [0], SETTINGS[0])
    assert (alone - together[:1]).abs().max() > 1e-3


def test_samples_are_reproducible_by_seed():
    network = network_of(CONFIG)
    first, again, other = (
        latents_of(network, CONFIG, [1, 1], [0, 1], SamplingSettings(steps=3, seed=seed))
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1
    assert (first[0] - first[1]).abs().max() > 0.1  # each image has noise of its own


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_ddpm_samples_with_the_learned_variance(sampler):
    network = network_of(DDPM)
    eta = 0.5 if sampler == "ddim" else 0.0
    settings = SamplingSettings(sampler=sampler, steps=10, guidance=1.5, eta=eta, seed=5)
    together = latents_of(network, DDPM, [0, 1, 2], [0, 1, 2], settings)
    alone = latents_of(network, DDPM, [2], [2], settings)
    assert together.shape == (3, 2, 8, 8)
    assert together.isfinite().all()
    # Kernels of some CPUs round by the batch's size; in 10 steps that grew to 2.4e-5.
    torch.testing.assert_close(alone, together[2:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config", [CONFIG, DDPM], ids=["flow", "ddpm"])
def test_the_observer_sees_times_and_guidance_where_it_acts(config):
    seen: list[tuple[float, bool]] = []
    settings = SamplingSettings(steps=4, guidance=2.0, guidance_interval=(0.4, 0.6))
    latents_of(
        network_of(config),
        config,
        [0],
        [0],
        settings,
        observe=lambda forward: seen.append((float(forward.time), forward.unconditional)),
    )
    conditional = [time for time, unconditional in seen if not unconditional]
    guided = [time for time, unconditional in seen if unconditional]
    if config is CONFIG:
        assert conditional == [0, 0.25, 0.5, 0.75]
        assert guided == [0.5]
    else:  # DiT's spacing of 4 steps: 999, 666, 333, 0
        assert conditional == pytest.approx([0.001, 0.334, 0.667, 1.0], abs=1e-6)
        assert guided == []


@pytest.mark.parametrize(("guidance", "images"), [(1.0, 3), (2.0, 6)])
def test_without_guidance_each_step_costs_one_forward(guidance: float, images: int):
    network, seen = network_of(CONFIG), []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    settings = SamplingSettings(steps=4, guidance=guidance)
    latents_of(network, CONFIG, [0, 1, 2], [0, 1, 2], settings)
    assert sum(seen) == 4 * images


@pytest.mark.parametrize("label", [-1, 5])
def test_a_class_that_is_not_there_is_refused(label: int):
    with pytest.raises(UserError, match=rf"class {label} is outside 0\.\.4 .*num_classes=5"):
        latents_of(network_of(CONFIG), CONFIG, [0, label], [0, 1], SamplingSettings(steps=1))


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (CONFIG, {"sampler": "ddim"}, "a flow model takes euler, heun, dopri5, sde"),
        (DDPM, {"sampler": "euler"}, "a ddpm model takes ddpm, ddim"),
        (DDPM, {"shift": 2.0}, "shift=2.0 spaces the steps of euler"),
        (CONFIG, {"eta": 0.5}, "eta=0.5 belongs to the sampler ddim"),
        (CONFIG, {"guidance_interval": (0.7, 0.2)}, "guidance interval 0.7,0.2: two rising times"),
        (CONFIG, {"guidance_interval": (0.2,)}, "guidance interval 0.2: two rising times"),
        (CONFIG, {"guided_channels": 3}, "guided_channels=3: choose 1 to 2"),
        (CONFIG, {"guidance": float("nan")}, "guidance=nan: give a finite number"),
        (CONFIG, {"steps": 0}, "0 sampling steps: euler takes 1 or more"),
        (CONFIG, {"shift": -1.0}, "shift from 0.001 to 1000"),
        (DDPM, {"steps": 2000}, "2000 sampling steps: ddpm takes 2 or more, up to 1000"),
        (DDPM, {"sampler": "ddim", "eta": 5.0}, "eta is from 0 to 1"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(config, settings, message):
    with pytest.raises(UserError, match=message):
        latents_of(network_of(config), config, [0], [0], SamplingSettings(**settings))


UNDROPPED = tiny_config(training__label_dropout=0)
UNDROPPED_TEXT = tiny_config(model__text=BYTES, training__label_dropout=0)


def test_guidance_needs_a_null_label_that_was_trained():
    network = network_of(UNDROPPED)
    with pytest.raises(UserError, match=r"guidance 1\.5: .* training\.label_dropout=0 .* 1$"):
        latents_of(network, UNDROPPED, [0], [0], SamplingSettings(steps=1, guidance=1.5))
    plain = SamplingSettings(steps=2)
    found = latents_of(network, UNDROPPED, [0], [0], plain)
    assert torch.equal(found, latents_of(network_of(CONFIG), CONFIG, [0], [0], plain))


def test_where_nobody_chose_guidance_it_is_what_the_model_can_do():
    said: list[str] = []
    unset = SamplingSettings(steps=3, guidance=None, seed=4)
    usual, unguided = (Sampler(network_of(config), config) for config in (CONFIG, UNDROPPED))
    assert usual.fitted(unset, said.append) == replace(unset, guidance=1.5)
    assert said == []
    assert unguided.fitted(unset, said.append) == replace(unset, guidance=1.0)
    assert len(said) == 1
    assert said[0].startswith("guidance 1: the model was trained without label dropout")
    chosen = replace(unset, guidance=3.0)
    assert unguided.fitted(chosen, said.append) == chosen  # to be refused
    assert len(said) == 1


def test_a_negative_prompt_takes_the_place_of_a_null_caption_that_was_never_trained():
    config, settings = UNDROPPED_TEXT, SamplingSettings(steps=1, guidance=2.0)
    plain, negative = (
        create_prompts(config, encoder_of(config), ["red"], n) for n in (None, "dim")
    )
    with pytest.raises(UserError, match="use guidance 1, or give a negative prompt"):
        latents_of(network_of(config), config, [0], [0], settings, prompts=plain)
    latents_of(network_of(config), config, [0], [0], settings, prompts=negative)
    sampler = Sampler(network_of(config), config, prompts=negative)
    assert sampler.fitted(replace(settings, guidance=None)).guidance == 1.5
    said: list[str] = []
    sampler = replace(sampler, prompts=plain)
    assert sampler.fitted(replace(settings, guidance=None), said.append).guidance == 1
    assert said[0].endswith("without label dropout, so only a negative prompt guides it")


def test_a_caption_that_was_not_given_is_refused():
    prompts = create_prompts(UNDROPPED_TEXT, encoder_of(UNDROPPED_TEXT), ["red"])
    config, settings = UNDROPPED_TEXT, SamplingSettings(steps=1)
    with pytest.raises(UserError, match=r"caption number 1 is outside 0\.\.0 \(1 were given\)"):
        latents_of(network_of(config), config, [1], [0], settings, prompts=prompts)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dopri5", "sde", "ddpm", "ddim"])
def test_weights_that_are_no_numbers_make_no_images(sampler):
    config = DDPM if sampler in ("ddpm", "ddim") else CONFIG
    network = network_of(config)
    network.final.bias.data[0] = torch.nan
    settings = SamplingSettings(sampler=sampler, steps=3)
    with pytest.raises(UserError, match="image 7 is not made of finite numbers: the model's wei"):
        latents_of(network, config, [0, 1], [7, 8], settings)


def test_an_overflow_on_the_way_stops_sampling():
    settings = SamplingSettings(steps=3, guidance=1e38)
    with pytest.raises(UserError, match=r"sampling overflowed \(guidance 1e\+38, 3 steps\)"):
        latents_of(network_of(CONFIG), CONFIG, [0], [0], settings)
