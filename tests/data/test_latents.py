import numpy as np
import pytest
import torch

from diffmoe.data.latents import model_latents
from diffmoe.data.manifest import Manifest
from diffmoe.seeding import keyed_generator


def manifest(fields, **changes):
    return Manifest(shards=[], **{**fields, **changes})


def moments(mean: float, spread: float, n: int) -> list[np.ndarray]:
    array = np.empty((4, 4, 4), np.float16)
    array[:2], array[2:] = mean, spread
    return [array] * n


def test_samples_pass_unchanged_but_for_the_type(fields):
    array = np.arange(32, dtype=np.float16).reshape(2, 4, 4)
    z = model_latents([array, -array], None, manifest(fields), keyed_generator(0))
    assert z.dtype == torch.float32
    assert torch.equal(z[0], torch.arange(32.0).reshape(2, 4, 4))
    assert torch.equal(z[1], -z[0])


def test_shift_and_scale_are_applied_per_channel_unless_already_in_the_files(fields):
    ones = [np.ones((2, 4, 4), np.float32)]
    statistics = {"scale": [2.0, 10.0], "shift": [0.5, -1.0]}
    z = model_latents(ones, None, manifest(fields, scaled=False, **statistics), keyed_generator(0))
    assert z[0, 0].unique().item() == 1.0  # (1 - 0.5) * 2
    assert z[0, 1].unique().item() == 20.0  # (1 + 1) * 10
    z = model_latents(ones, None, manifest(fields, scaled=True, **statistics), keyed_generator(0))
    assert z.unique().item() == 1.0


@pytest.mark.parametrize(
    ("content", "spread", "deviation"),
    [
        ("mean_std", 0.5, 0.5),
        ("mean_logvar", 2 * np.log(0.5), 0.5),
        ("mean_logvar", -1000.0, np.exp(-15)),  # clamped at -30
        ("mean_logvar", 1000.0, np.exp(10)),  # clamped at 20
    ],
)
def test_posterior_draws_have_the_mean_and_deviation_of_the_moments(
    fields, content, spread, deviation
):
    z = model_latents(
        moments(0.0, spread, 500), None, manifest(fields, content=content), keyed_generator(1)
    )
    assert z.shape == (500, 2, 4, 4)
    # 16,000 draws: relative error of a deviation 1/sqrt(32,000) = 0.6 %, of the mean 0.8 %.
    assert z.std().item() == pytest.approx(deviation, rel=0.03)
    assert abs(z.mean().item()) < 0.04 * deviation
    mean = model_latents(
        moments(3.0, spread, 500), None, manifest(fields, content=content), keyed_generator(1)
    )
    assert torch.allclose(mean - z, torch.tensor(3.0), atol=1e-2)  # fp32 beside e^10


def test_half_of_the_samples_are_mirrored(fields):
    plain = [np.full((2, 4, 4), 1, np.float16)] * 1000
    mirrored = [np.full((2, 4, 4), -1, np.float16)] * 1000
    z = model_latents(plain, mirrored, manifest(fields, flips=True), keyed_generator(2))
    # 1000 coins: deviation 16
    assert 435 < (z[:, 0, 0, 0] < 0).sum().item() < 565


def test_mirrored_moments_are_drawn_with_the_same_noise(fields):
    own = manifest(fields, content="mean_std", flips=True)
    z = model_latents(moments(1, 0.5, 64), moments(-1, 0.5, 64), own, keyed_generator(3))
    same = model_latents(moments(1, 0.5, 64), moments(1, 0.5, 64), own, keyed_generator(3))
    assert set((same - z).unique().round().tolist()) == {0, 2}  # mean 1 against 1 or -1
