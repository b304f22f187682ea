"""Gaussian diffusion with OpenAI's improved-diffusion settings, as DiT and the paper use it.

Linear betas, epsilon prediction, learned range variance (arXiv 2102.09672, Eq. 15 and 16). Tables
are float64, computation is fp32. Shapes: images (n, C, H, W), steps t (n,) int64.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.errors import UserError


class Posterior(NamedTuple):
    """q(x_{t-1} | x_t, data), each (n, C, H, W)."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor


class Prediction(NamedTuple):
    """The model's p(x_{t-1} | x_t) and the data that it predicts, each (n, C, H, W)."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    pred_data: Tensor


class GaussianDiffusion:
    """Linear betas: 1e-4 to 0.02 at 1000 steps, scaled to about the same total noise elsewhere.

    t of every method counts this diffusion's own steps, 0 (least noise) to steps - 1. The network
    is called with `timesteps[t]`, the original timestep; the two differ only after `respaced`.
    """

    def __init__(self, steps: int = 1000) -> None:
        if steps <= 20:  # the scaled betas end at 20 / steps, which has to stay below 1
            raise UserError(f"diffusion steps={steps}: a linear schedule needs more than 20")
        scale = 1000 / steps
        betas = torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)
        self._set_schedule(betas, torch.arange(steps))

    def _set_schedule(self, betas: Tensor, timesteps: Tensor) -> None:
        self.steps = len(betas)
        self.timesteps = timesteps
        self.betas = betas
        alphas = 1 - betas
        self.alphas_cumprod = alphas.cumprod(0)
        self.alphas_cumprod_prev = torch.cat([betas.new_ones(1), self.alphas_cumprod[:-1]])
        # q(x_{t-1} | x_t, data): arXiv 2006.11239, Eq. 6 and 7.
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        # At t = 0 the posterior's variance is 0, which has no logarithm, and beta far larger: that
        # of t = 1 stands for both.
        first = self.posterior_variance[1:2]
        fixed_variance = torch.cat([first, betas[1:]])
        self._tables = {
            "signal": self.alphas_cumprod.sqrt(),
            "spread": (1 - self.alphas_cumprod).sqrt(),
            "inverse signal": self.alphas_cumprod.rsqrt(),
            "spread by signal": (1 / self.alphas_cumprod - 1).sqrt(),
            "log beta": betas.log(),
            "fixed variance": fixed_variance,
            "fixed log variance": fixed_variance.log(),
            "posterior variance": self.posterior_variance,
            "posterior log variance": torch.cat([first, self.posterior_variance[1:]]).log(),
            "posterior data weight": (
                betas * self.alphas_cumprod_prev.sqrt() / (1 - self.alphas_cumprod)
            ),
            "posterior x weight": (
                (1 - self.alphas_cumprod_prev) * alphas.sqrt() / (1 - self.alphas_cumprod)
            ),
        }
        self._tables_on: dict[torch.device, dict[str, Tensor]] = {}

    def _at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """table[t] as fp32 (n, 1, 1, 1) on `like`'s device, where the tables are copied once."""
        device = like.device
        if device not in self._tables_on:
            tables = {key: table.float().to(device) for key, table in self._tables.items()}
            self._tables_on[device] = tables
        values = self._tables_on[device][name][t.to(device)]
        return values.view(-1, *[1] * (like.ndim - 1))

    def respaced(self, steps: int | Sequence[int]) -> "GaussianDiffusion":
        """A diffusion of some of these steps, with the same noise level at each of them.

        steps: their number, spread evenly from the first to the last as DiT does; or which ones, as
        t of this diffusion. At least two. Raises UserError for others.
        """
        if isinstance(steps, int):
            if not 2 <= steps <= self.steps:
                raise UserError(f"{steps} sampling steps: choose 2 to {self.steps}")
            chosen = evenly_spaced(self.steps, steps)
        else:
            chosen = sorted(steps)
            if len(chosen) < 2 or len(set(chosen)) < len(chosen):
                raise UserError(f"sampling steps {chosen}: choose two or more different ones")
            if chosen[0] < 0 or chosen[-1] >= self.steps:
                raise UserError(f"sampling steps {chosen}: choose from 0 to {self.steps - 1}")
        alphas_cumprod = self.alphas_cumprod[chosen]
        previous = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        spaced = object.__new__(type(self))
        spaced._set_schedule(1 - alphas_cumprod / previous, self.timesteps[chosen])
        return spaced

    def timesteps_at(self, time_N: Tensor) -> Tensor:
        """t (n,) int64 of times from 0, noise, to 1, data; every step has an equal share."""
        return ((1 - time_N) * self.steps).long().clamp(0, self.steps - 1)

    def sample_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """t (n,), int64 on the CPU, uniform."""
        return torch.randint(self.steps, (n,), generator=generator)

    def corrupt(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) data + sqrt(1 - abar_t) noise (arXiv 2006.11239, Eq. 4), fp32."""
        signal = self._at("signal", t, data)
        spread = self._at("spread", t, data)
        return signal * data.float() + spread * noise.float()

    def loss(
        self, prediction: Tensor, x_t: Tensor, data: Tensor, noise: Tensor, t: Tensor
    ) -> dict[str, Tensor]:
        """Per sample (n,) fp32: "mse" of epsilon, "vb" in bits per dimension, "loss" their sum.

        prediction: (n, 2C, H, W), epsilon and variance; the vb term trains the variance only, with
        its mean detached. With (n, C, H, W) the variance is fixed, and "loss" is "mse".
        """
        channels = data.shape[1]
        mse = (prediction[:, :channels].float() - noise.float()).square().flatten(1).mean(1)
        if not self._has_variance(prediction, channels):
            return {"loss": mse, "mse": mse}
        epsilon, variance = prediction.split(channels, dim=1)
        vb = self._variational_bound(torch.cat([epsilon.detach(), variance], 1), x_t, data, t)
        return {"loss": mse + vb, "mse": mse, "vb": vb}

    def _variational_bound(self, output: Tensor, x_t: Tensor, data: Tensor, t: Tensor) -> Tensor:
        """Term t of the bound in bits per dimension (n,): KL(q || p); at t = 0 the decoder's."""
        q = self.q_posterior(data, x_t, t)
        p = self.p_mean_variance(output, x_t, t)
        kl = 0.5 * (
            p.log_variance
            - q.log_variance
            - 1
            + torch.exp(q.log_variance - p.log_variance)
            + (q.mean - p.mean).square() * torch.exp(-p.log_variance)
        )
        nll = -discretized_log_likelihood(data.float(), p.mean, 0.5 * p.log_variance)
        kl, nll = (term.flatten(1).mean(1) / math.log(2) for term in (kl, nll))
        return torch.where(t.to(kl.device) == 0, nll, kl)

    def q_posterior(self, data: Tensor, x_t: Tensor, t: Tensor) -> Posterior:
        """q(x_{t-1} | x_t, data) (arXiv 2006.11239, Eq. 6 and 7)."""
        x_t = x_t.float()
        mean = (
            self._at("posterior data weight", t, x_t) * data.float()
            + self._at("posterior x weight", t, x_t) * x_t
        )
        variance = self._at("posterior variance", t, x_t).expand_as(x_t)
        log_variance = self._at("posterior log variance", t, x_t).expand_as(x_t)
        return Posterior(mean, variance, log_variance)

    def p_mean_variance(
        self, model_output: Tensor, x_t: Tensor, t: Tensor, clip: bool = False
    ) -> Prediction:
        """One reverse step of the model, p(x_{t-1} | x_t).

        model_output: (n, 2C, H, W): the last C channels v set the log variance between its bounds,
        v = -1 the posterior's and v = 1 beta's (arXiv 2102.09672, Eq. 15). With (n, C, H, W) the
        variance is beta (DiT's "fixed large").
        clip: clamp the predicted data to [-1, 1]; right for pixels, wrong for latents.
        """
        x_t = x_t.float()
        channels = x_t.shape[1]
        if self._has_variance(model_output, channels):
            low = self._at("posterior log variance", t, x_t)
            high = self._at("log beta", t, x_t)
            weight = (model_output[:, channels:].float() + 1) / 2
            log_variance = weight * high + (1 - weight) * low
            variance = log_variance.exp()
        else:
            variance = self._at("fixed variance", t, x_t).expand_as(x_t)
            log_variance = self._at("fixed log variance", t, x_t).expand_as(x_t)
        pred_data = self._data_from_epsilon(model_output[:, :channels].float(), x_t, t)
        if clip:
            pred_data = pred_data.clamp(-1, 1)
        mean = self.q_posterior(pred_data, x_t, t).mean
        return Prediction(mean, variance, log_variance, pred_data)

    def _data_from_epsilon(self, epsilon: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """`corrupt` solved for data."""
        x_weight = self._at("inverse signal", t, x_t)
        epsilon_weight = self._at("spread by signal", t, x_t)
        return x_weight * x_t - epsilon_weight * epsilon

    def epsilon_from_data(self, data: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """`corrupt` solved for the noise, fp32 (n, C, H, W)."""
        x_weight = self._at("inverse signal", t, x_t)
        epsilon_weight = self._at("spread by signal", t, x_t)
        return (x_weight * x_t.float() - data.float()) / epsilon_weight

    def _has_variance(self, model_output: Tensor, channels: int) -> bool:
        if model_output.shape[1] not in (channels, 2 * channels):
            raise ValueError(f"{model_output.shape[1]} predicted channels for data of {channels}")
        return model_output.shape[1] == 2 * channels


def evenly_spaced(steps: int, count: int) -> list[int]:
    """`count` of the indices 0..steps-1, both ends included (DiT's space_timesteps, one section).

    Multiples of the stride are summed up and rounded half to even as in DiT's code: published
    samplers depend on it.
    """
    stride = (steps - 1) / (count - 1)
    chosen, position = [], 0.0
    for _ in range(count):
        chosen.append(round(position))
        position += stride
    return chosen


def discretized_log_likelihood(data: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of a Gaussian's mass in data's bin, for 8-bit values scaled to [-1, 1], elementwise.

    improved-diffusion's decoder, with its tanh approximation of the normal distribution function.
    DiT keeps it for latents, which have no bins.
    """
    centered = data - mean
    inverse_scale = torch.exp(-log_scale)
    below_upper = _normal_cdf(inverse_scale * (centered + 1 / 255))
    below_lower = _normal_cdf(inverse_scale * (centered - 1 / 255))
    mass = torch.where(
        data < -0.999,  # the lowest bin is open to the left, the highest to the right
        below_upper,
        torch.where(data > 0.999, 1 - below_lower, below_upper - below_lower),
    )
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
