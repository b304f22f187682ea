import numpy as np
import pytest
import torch

from diffmoe.data.latents import NotFinite, draw_mirrored, model_latents, to_stored
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
    z = model_latents([array, -array], manifest(fields), keyed_generator(0))
    assert z.dtype == torch.float32
    assert torch.equal(z[0], torch.arange(32.0).reshape(2, 4, 4))
    assert torch.equal(z[1], -z[0])


def test_shift_and_scale_are_applied_per_channel_unless_already_in_the_files(fields):
    ones = [np.ones((2, 4, 4), np.float32)]
    statistics = {"scale": [2.0, 10.0], "shift": [0.5, -1.0]}
    z = model_latents(ones, manifest(fields, scaled=False, **statistics), keyed_generator(0))
    assert z[0, 0].unique().item() == 1.0  # (1 - 0.5) * 2
    assert z[0, 1].unique().item() == 20.0  # (1 + 1) * 10
    z = model_latents(ones, manifest(fields, scaled=True, **statistics), keyed_generator(0))
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
        moments(0.0, spread, 500), manifest(fields, content=content), keyed_generator(1)
    )
    assert z.shape == (500, 2, 4, 4)
    # 16,000 draws: relative error of a deviation 1/sqrt(32,000) = 0.6 %, of the mean 0.8 %.
    assert z.std().item() == pytest.approx(deviation, rel=0.03)
    assert abs(z.mean().item()) < 0.04 * deviation
    mean = model_latents(
        moments(3.0, spread, 500), manifest(fields, content=content), keyed_generator(1)
    )
    assert torch.allclose(mean - z, torch.tensor(3.0), atol=1e-2)  # fp32 beside e^10


def test_half_of_the_samples_are_mirrored_if_there_are_flips(fields):
    mirrored = draw_mirrored(1000, manifest(fields, flips=True), keyed_generator(2))
    assert 435 < sum(mirrored) < 565  # 1000 coins: deviation 16
    assert draw_mirrored(1000, manifest(fields, flips=False), keyed_generator(2)) == [False] * 1000


def test_bfloat16_is_stored_as_its_bits(fields):
    array = np.random.default_rng(0).standard_normal((2, 4, 4)).astype(np.float32) * 1e6
    bits = to_stored(array, "bfloat16")
    assert bits.dtype == np.uint16
    z = model_latents([bits], manifest(fields, dtype="bfloat16"), keyed_generator(0))
    assert torch.equal(z[0], torch.from_numpy(array).bfloat16().float())


@pytest.mark.parametrize("content", ["sample", "mean_std", "mean_logvar"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_named(fields, content, value):
    arrays = [np.zeros((2 if content == "sample" else 4, 4, 4), np.float16) for _ in range(3)]
    arrays[1][-1, 2, 3] = value
    with pytest.raises(NotFinite) as caught:
        model_latents(arrays, manifest(fields, content=content), keyed_generator(0))
    assert caught.value.index == 1
