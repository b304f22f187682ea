import pytest
import torch
from torch.testing import assert_close

from diffmoe.diffusion import create_objective
from diffmoe.diffusion.flow import FlowMatching, shifted
from diffmoe.errors import UserError
from tests.helpers.tiny import tiny_config


def batch(n: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    data, noise = torch.randn(2, n, 4, 3, 3, generator=generator)
    return data, noise, torch.linspace(0, 1, n)


def test_paths_run_straight_from_noise_to_data():
    data, noise, t = batch()
    x_t = FlowMatching().corrupt(data, noise, t)
    assert torch.equal(x_t[0], noise[0])
    assert torch.equal(x_t[-1], data[-1])
    assert_close(x_t[1], 0.25 * data[1] + 0.75 * noise[1])


def test_velocity_towards_a_point_mass_has_no_loss():
    _, noise, _ = batch()
    point = torch.full_like(noise, 0.3)
    t = torch.tensor([0.0, 0.2, 0.5, 0.8, 0.9])
    flow = FlowMatching()
    x_t = flow.corrupt(point, noise, t)
    velocity = (point - x_t) / (1 - t.view(-1, 1, 1, 1))
    loss = flow.loss(velocity, x_t, point, noise, t)["loss"]
    # Rounding of x_t divided by 1 - t = 0.1, squared.
    assert_close(loss, torch.zeros(5), rtol=0, atol=1e-11)
    assert (flow.loss(-velocity, x_t, point, noise, t)["loss"] > 1).all()


def test_loss_is_each_samples_mean_squared_error():
    data, noise, t = batch()
    offset = torch.arange(5.0).view(5, 1, 1, 1)
    terms = FlowMatching().loss(data - noise + offset, data, data, noise, t)
    assert_close(terms["loss"], torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0]))
    assert torch.equal(terms["loss"], terms["mse"])


def test_sigma_channels_do_not_enter_the_loss():
    data, noise, t = batch()
    prediction = torch.randn(5, 8, 3, 3).requires_grad_()
    both = FlowMatching().loss(prediction, data, data, noise, t)["loss"]
    alone = FlowMatching().loss(prediction[:, :4], data, data, noise, t)["loss"]
    assert torch.equal(both, alone)
    both.sum().backward()
    assert torch.count_nonzero(prediction.grad[:, 4:]) == 0
    with pytest.raises(ValueError, match="5 predicted channels for data of 4"):
        FlowMatching().loss(prediction[:, :5], data, data, noise, t)


def test_bf16_inputs_are_computed_in_fp32():
    data, noise, t = batch()
    data, noise = data.bfloat16(), noise.bfloat16()
    flow = FlowMatching()
    assert torch.equal(flow.corrupt(data, noise, t), flow.corrupt(data.float(), noise.float(), t))
    loss = flow.loss(noise, data, data, noise, t)["loss"]
    assert loss.dtype == torch.float32
    assert_close(loss, (2 * noise.float() - data.float()).square().mean((1, 2, 3)))


def test_uniform_timesteps_are_uniform():
    t = FlowMatching().sample_timesteps(20_000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.float32
    assert t.min() >= 0
    assert t.max() < 1
    # The empirical distribution function strays by less than 1.63 / sqrt(n) at 99%.
    rank = (torch.arange(20_000) + 0.5) / 20_000
    assert (t.sort().values - rank).abs().max() < 1.63 / 20_000**0.5


def test_logit_normal_timesteps_follow_their_distribution():
    flow = FlowMatching("logit_normal")
    t = flow.sample_timesteps(20_000, torch.Generator().manual_seed(0))
    uniform = torch.special.ndtr(torch.logit(t)).sort().values
    rank = (torch.arange(20_000) + 0.5) / 20_000
    assert (uniform - rank).abs().max() < 1.63 / 20_000**0.5


@pytest.mark.parametrize("timesteps", ["uniform", "logit_normal"])
def test_a_shift_moves_every_timestep_towards_noise(timesteps):
    plain, moved = (
        FlowMatching(timesteps, shift).sample_timesteps(1000, torch.Generator().manual_seed(0))
        for shift in (1.0, 3.0)
    )
    noise = 1 - plain.double()
    assert_close(moved.double(), 1 - 3 * noise / (1 + 2 * noise), atol=1e-6, rtol=0)
    assert (moved < plain).all()


def test_a_shift_by_size_is_that_of_rae():
    """The tests that arXiv 2510.11690's rule suggests: 0, 1, the middle, one after the other."""
    latents = {"model.in_channels": 768, "model.input_size": 16}
    config = tiny_config(diffusion__timestep_shift="by_size").replace(latents)
    assert config.timestep_shift == pytest.approx((16 * 16 * 768 / 4096) ** 0.5)
    assert config.timestep_shift == pytest.approx(6.93, abs=0.01)
    assert shifted(0.5, config.timestep_shift) == pytest.approx(0.874, abs=1e-3)
    assert shifted(0.0, 6.93) == 0
    assert shifted(1.0, 6.93) == 1
    assert shifted(shifted(0.3, 2.0), 3.0) == pytest.approx(shifted(0.3, 6.0))
    assert shifted(shifted(0.3, 4.0), 0.25) == pytest.approx(0.3)
    # What the published sizes of 4,096 numbers, 4x32x32, were tuned for stays as it was.
    small = {"model.in_channels": 16, "model.input_size": [8, 32]}
    assert config.replace(small).timestep_shift == 1


def test_training_draws_its_times_by_size():
    config = tiny_config(diffusion__timestep_shift="by_size", model__in_channels=256)
    objective = create_objective(config)
    assert objective.shift == 2  # 256 x 8 x 8 numbers
    t = objective.sample_timesteps(1000, torch.Generator().manual_seed(0))
    plain = FlowMatching().sample_timesteps(1000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(1 - t, 2 * (1 - plain) / (2 - plain))


def test_a_shift_of_one_changes_no_bit():
    t = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        FlowMatching(shift=1.0).sample_timesteps(1000, torch.Generator().manual_seed(0)), t
    )


def test_unknown_timestep_density_is_refused():
    with pytest.raises(UserError, match="'uniform' or 'logit_normal'"):
        FlowMatching("cosine")
