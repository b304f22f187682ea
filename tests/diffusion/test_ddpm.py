import pytest
import torch
from torch.testing import assert_close

from diffmoe.diffusion.ddpm import GaussianDiffusion
from diffmoe.errors import UserError

# fp32 against fp32 of other code: the sums run in another order.
CLOSE = {"rtol": 1e-5, "atol": 2e-5}


def test_tables_equal_the_release(reference):
    diffusion = GaussianDiffusion()
    # The release derives its betas from the cumulative product: float64 rounding of values near 1.
    assert_close(diffusion.betas, reference["betas"], rtol=0, atol=3e-16)
    assert_close(diffusion.alphas_cumprod, reference["alphas_cumprod"], rtol=1e-12, atol=0)


def test_coefficients_follow_from_their_definition():
    diffusion = GaussianDiffusion(1000)
    assert diffusion.betas[0] == 1e-4
    assert diffusion.betas[-1] == 0.02
    product = 1.0
    for t in range(1000):
        previous, product = product, product * (1 - float(diffusion.betas[t]))
        assert float(diffusion.alphas_cumprod[t]) == pytest.approx(product, rel=1e-12)
        if t in (1, 17, 500, 999):
            # Bayes: precisions of q(x_t | x_{t-1}), seen as a likelihood of x_{t-1}, and of
            # q(x_{t-1} | data) add up; the means weigh with them.
            beta = float(diffusion.betas[t])
            likelihood, prior = (1 - beta) / beta, 1 / (1 - previous)
            variance = 1 / (likelihood + prior)
            assert float(diffusion.posterior_variance[t]) == pytest.approx(variance, rel=1e-9)
            data, x_t = torch.full((1, 1, 1, 1), 0.7), torch.full((1, 1, 1, 1), -0.4)
            mean = variance * (likelihood * -0.4 / (1 - beta) ** 0.5 + prior * previous**0.5 * 0.7)
            q = diffusion.q_posterior(data, x_t, torch.tensor([t]))
            assert float(q.mean) == pytest.approx(mean, rel=1e-5)
            assert float(q.variance) == pytest.approx(variance, rel=1e-6)


def test_corrupted_data_equals_the_release(reference):
    x_t = GaussianDiffusion().corrupt(reference["in.x0"], reference["in.noise"], reference["in.t"])
    assert_close(x_t, reference["train.x_t"], rtol=1e-6, atol=1e-6)


def test_loss_terms_equal_the_release(reference):
    data, noise, t = reference["in.x0"], reference["in.noise"], reference["in.t"]
    assert 0 in t  # the decoder's term
    terms = GaussianDiffusion().loss(
        reference["in.model_output"], reference["train.x_t"], data, noise, t
    )
    assert_close(terms["mse"], reference["train.mse"], **CLOSE)
    assert_close(terms["vb"], reference["train.vb"], **CLOSE)
    assert torch.equal(terms["loss"], terms["mse"] + terms["vb"])


def test_vb_trains_the_variance_channels_only(reference):
    data, noise, t = reference["in.x0"], reference["in.noise"], reference["in.t"]
    output = reference["in.model_output"].clone().requires_grad_()
    terms = GaussianDiffusion().loss(output, reference["train.x_t"], data, noise, t)
    (of_vb,) = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    (of_mse,) = torch.autograd.grad(terms["mse"].sum(), output)
    assert torch.count_nonzero(of_vb[:, :4]) == 0
    # The bound's variance term fades with t: beta and the posterior's variance grow alike.
    assert (of_vb[:, 4:].abs().amax((1, 2, 3))[t < 300] > 1e-6).all()
    assert_close(of_mse[:, :4], 2 * (output[:, :4] - noise).detach() / (4 * 8 * 8))
    assert torch.count_nonzero(of_mse[:, 4:]) == 0


def test_without_variance_channels_the_loss_is_mse_and_the_variance_beta(reference):
    diffusion, t = GaussianDiffusion(), reference["in.t"]
    epsilon, x_t = reference["in.model_output"][:, :4], reference["train.x_t"]
    terms = diffusion.loss(epsilon, x_t, reference["in.x0"], reference["in.noise"], t)
    assert set(terms) == {"loss", "mse"}
    assert torch.equal(terms["loss"], terms["mse"])
    step = diffusion.p_mean_variance(epsilon, x_t, t)
    assert_close(step.mean, reference["p.mean"], **CLOSE)
    expected = torch.where(t == 0, diffusion.posterior_variance[1], diffusion.betas[t]).float()
    assert_close(step.variance[:, 0, 0, 0], expected)
    assert_close(step.log_variance[:, 0, 0, 0], expected.log())


def test_loss_of_bf16_predictions_is_fp32_and_exact_for_them(reference):
    data, noise, t = reference["in.x0"], reference["in.noise"], reference["in.t"]
    output = reference["in.model_output"].bfloat16()
    ours = GaussianDiffusion().loss(output, reference["train.x_t"], data, noise, t)
    wide = GaussianDiffusion().loss(output.float(), reference["train.x_t"], data, noise, t)
    assert ours["loss"].dtype == torch.float32
    assert torch.equal(ours["loss"], wide["loss"])


def test_posterior_equals_the_release(reference):
    q = GaussianDiffusion().q_posterior(
        reference["in.x0"], reference["train.x_t"], reference["in.t"]
    )
    assert_close(q.mean, reference["posterior.mean"], rtol=1e-6, atol=1e-6)
    assert_close(q.variance, reference["posterior.variance"], rtol=1e-6, atol=0)
    assert_close(q.log_variance, reference["posterior.log_variance"], rtol=1e-6, atol=0)


def test_model_step_equals_the_release(reference):
    step = GaussianDiffusion().p_mean_variance(
        reference["in.model_output"], reference["train.x_t"], reference["in.t"]
    )
    assert_close(step.mean, reference["p.mean"], **CLOSE)
    # exp of a log variance around -10: its rounding is relative.
    assert_close(step.variance, reference["p.variance"], rtol=1e-5, atol=0)
    assert_close(step.log_variance, reference["p.log_variance"], rtol=1e-6, atol=1e-6)
    # At t = 999 epsilon is scaled by 157.
    assert_close(step.pred_data, reference["p.pred_xstart"], rtol=1e-5, atol=1e-4)


def test_clipping_holds_the_predicted_data_and_moves_the_mean(reference):
    diffusion, x_t, t = GaussianDiffusion(), reference["train.x_t"], reference["in.t"]
    free = diffusion.p_mean_variance(reference["in.model_output"], x_t, t)
    held = diffusion.p_mean_variance(reference["in.model_output"], x_t, t, clip=True)
    assert torch.equal(held.pred_data, free.pred_data.clamp(-1, 1))
    assert torch.equal(held.mean, diffusion.q_posterior(held.pred_data, x_t, t).mean)


@pytest.mark.parametrize("count", [10, 250])
def test_respaced_timesteps_equal_the_release(reference, count):
    spaced = GaussianDiffusion().respaced(count)
    assert torch.equal(spaced.timesteps, reference[f"run{count}.timesteps"])
    assert spaced.steps == count


def test_respacing_keeps_the_noise_level_of_each_step():
    diffusion = GaussianDiffusion()
    spaced = diffusion.respaced([999, 0, 500])
    assert spaced.timesteps.tolist() == [0, 500, 999]
    assert_close(spaced.alphas_cumprod, diffusion.alphas_cumprod[[0, 500, 999]], rtol=1e-12, atol=0)
    everything = diffusion.respaced(1000)
    assert_close(everything.betas, diffusion.betas, rtol=1e-10, atol=0)
    again = diffusion.respaced(100).respaced(10)
    assert again.timesteps.tolist() == diffusion.respaced(10).timesteps.tolist()


@pytest.mark.parametrize("steps", [0, 1, 1001, [5], [3, 3], [0, 1000], [-1, 4]])
def test_respacing_refuses_what_it_cannot_visit(steps):
    with pytest.raises(UserError, match="sampling steps"):
        GaussianDiffusion().respaced(steps)


def test_training_timesteps_are_uniform_integers():
    t = GaussianDiffusion().sample_timesteps(20_000, torch.Generator().manual_seed(0))
    assert t.dtype == torch.int64
    assert (int(t.min()), int(t.max())) == (0, 999)
    # Ten bins of 2000 +- 42: five deviations.
    assert (torch.bincount(t // 100) - 2000).abs().max() < 212
    with pytest.raises(UserError, match="more than 20"):
        GaussianDiffusion(20)
