"""A Sampler is a value: another capacity is another sampler, and its network is left as it was."""

from dataclasses import replace

import pytest
import torch

from diffmoe.capacity.thresholds import Calibrated, store
from diffmoe.config import EvaluationConfig
from diffmoe.data.autoencoders import PixelAutoencoder
from diffmoe.diffusion.settings import GUIDANCE, PREVIEW_STEPS, SamplingSettings
from diffmoe.errors import UserError
from diffmoe.models.routing_mode import RoutingMode
from diffmoe.sampling import sampler as module
from diffmoe.sampling.passes import noise_passes
from diffmoe.sampling.sampler import Sampler
from tests.helpers.models import exported
from tests.helpers.networks import CONFIG, network_of
from tests.helpers.tiny import tiny_config

SETTINGS = SamplingSettings(steps=2, guidance=1.5)


def test_a_capacity_acts_while_sampling_and_leaves_the_network_as_it_was(tmp_path):
    folder = exported(tmp_path / "model")
    entry = Calibrated(
        weights="ema", capacity=0.8, measured=0.8, common=False, over="noise", samples=1,
        log_odds=[[100.0] * 4] * 2,
    )  # fmt: skip
    store(folder, "0.8", entry)
    sampler = Sampler.open(folder)
    before = sampler.network.routing
    idle, half = sampler.with_capacity(0.8), sampler.with_capacity(0.5, "static")
    met = [one.images([0, 1], SETTINGS).capacity.average for one in (sampler, idle, half)]
    assert met[1:] == [0, 0.5]
    assert met[0] > 0.1
    assert sampler.network.routing is before
    with pytest.raises(UserError, match="class 9 is outside"):
        idle.images([9], SETTINGS)
    sampler.network.final.bias.data[0] = torch.nan
    with pytest.raises(UserError, match="is not made of finite numbers"):
        idle.images([0], SETTINGS)
    assert sampler.network.routing is before
    kinds = [one.identity() for one in (sampler, idle, half)]
    assert [kind["capacity"] for kind in kinds] == [None, 0.8, 0.5]
    assert [kind["routing"] for kind in kinds] == ["per_token", "per_token", "static"]
    assert kinds[0]["thresholds_sha256"] != kinds[1]["thresholds_sha256"]


def test_a_network_is_sampled_as_it_routes_where_no_capacity_was_chosen():
    network = network_of(CONFIG)
    with network.routed(RoutingMode("static", 0.5)):
        made = Sampler(network, CONFIG, PixelAutoencoder()).images([0, 1], SETTINGS)
    assert made.capacity.average == 0.5


def test_settings_are_checked_once_a_request(tmp_path, monkeypatch):
    checks, check = [], module.check_sampling
    monkeypatch.setattr(
        module, "check_sampling", lambda *arguments: (checks.append(1), check(*arguments))
    )
    folder = exported(tmp_path / "model")
    sampler = Sampler.open(folder)
    sampler.images([0, 1, 2], SETTINGS, batch=1)
    assert len(checks) == 1
    sampler.latents([0, 1, 2], SETTINGS, batch=1)
    assert len(checks) == 2
    sampler.folder(tmp_path / "out", sampler.request(5), SETTINGS, batch=1, shard_size=2)
    assert len(checks) == 3


def test_a_live_network_has_no_origin_and_latents_need_no_autoencoder():
    sampler = Sampler(network_of(CONFIG), CONFIG)
    assert sampler.latents([0], SETTINGS).shape == (1, 2, 8, 8)
    with pytest.raises(ValueError, match="has no autoencoder"):
        sampler.images([0], SETTINGS)
    with pytest.raises(ValueError, match="live network"):
        sampler.with_capacity(1.0)
    with pytest.raises(ValueError, match=r"Sampler\.fitted"):
        sampler.latents([0], replace(SETTINGS, guidance=None))


@pytest.mark.parametrize(("channels", "gray"), [(1, True), (3, False)])
def test_a_model_of_gray_images_is_known_when_it_is_opened(tmp_path, channels, gray):
    model = exported(tmp_path / "model", tiny_config(model__in_channels=channels))
    assert Sampler.open(model).model.latents.makes_gray == gray


def test_passes_over_data_need_data():
    with pytest.raises(UserError, match="does not say where its data is"):
        noise_passes(network_of(CONFIG), CONFIG, 4, 2, seed=0)


def test_defaults_are_the_same_wherever_they_are_written():
    assert EvaluationConfig().steps == PREVIEW_STEPS
    assert EvaluationConfig().guidance == SamplingSettings().guidance == 1
    assert GUIDANCE == 1.5
