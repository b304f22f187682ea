"""From noise to data: Euler, Heun and dopri5 for flows, DDPM and DDIM for Gaussian diffusion.

A model is a callable of (x, t); `guided` makes one from a network and labels. `progress`, where
given, is called with the fraction of the trajectory that is done.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from diffmoe.diffusion.ddpm import GaussianDiffusion
from diffmoe.errors import UserError
from diffmoe.seeding import keyed_generator

Model = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[float], None]


class SampleNoise:
    """Noise of the samples `indices` of one seed, whichever batch they are drawn in.

    Each sample has its own generator, keyed (seed, "sample", index). The first draw is the initial
    noise, the later ones are those of the sampler's steps.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> None:
        self._generators = [keyed_generator(seed, "sample", int(index)) for index in indices]
        self._shape = tuple(shape)

    def draw(self) -> Tensor:
        """The next standard normal numbers, (n, *shape) fp32 on the CPU."""
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._generators])


def guided(
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    labels: Tensor,
    null_label: int,
    scale: float,
    channels: int,
    guided_channels: int | None = None,
    *,
    keep_variance: bool,
) -> Model:
    """Classifier-free guidance: unconditional + scale * (conditional - unconditional).

    network: (x, t, labels) -> (n, channels or 2 * channels, ...). The two passes are two forwards,
    so that they never share a token pool; at scale 1 only the conditional one runs.
    guided_channels: guide only the first ones, the others come from the conditional pass; the
    release's DDPM runs guide 3. None guides all.
    keep_variance: append the variance channels of the conditional pass, where the network has them
    (sample_ddpm wants them, sample_flow does not).
    """
    last = channels if guided_channels is None else guided_channels
    if not 1 <= last <= channels:
        raise UserError(f"guided_channels={last}: choose 1 to {channels}")

    def model(x: Tensor, t: Tensor) -> Tensor:
        out = network(x, t, labels).float()
        if not keep_variance:
            out = out[:, :channels]
        if scale == 1:
            return out
        conditional = out[:, :last]
        unconditional = network(x, t, torch.full_like(labels, null_label))[:, :last].float()
        steered = unconditional + scale * (conditional - unconditional)
        return torch.cat([steered, out[:, last:]], 1)

    return model


@torch.no_grad()
def sample_flow(
    velocity: Model,
    noise: Tensor,
    steps: int = 250,
    method: Literal["euler", "heun", "dopri5"] = "euler",
    progress: Progress | None = None,
) -> Tensor:
    """Follow dx/dt = velocity(x, t) from noise at t = 0 to data at t = 1, both (n, C, H, W) fp32.

    velocity: takes t (n,) fp32 and returns (n, C, H, W).
    steps: equal intervals, one evaluation each with euler and two with heun. dopri5 chooses its
    own, from the error over the whole batch: a sample then depends on its batch mates, within the
    tolerance.
    """
    if method not in ("euler", "heun", "dopri5"):
        raise UserError(f"flow sampler {method!r}: choose 'euler', 'heun' or 'dopri5'")
    x = noise.float()

    def slope(x: Tensor, t: float | Tensor) -> Tensor:
        # t may be a scalar tensor on the device: expanding it does not wait for its value.
        t = torch.as_tensor(t, dtype=torch.float32, device=x.device)
        return velocity(x, t.expand(len(x)).contiguous()).float()

    if method == "dopri5":
        return _dopri5(slope, x, progress)
    if steps < 1:
        raise UserError(f"{steps} sampling steps: need at least 1")
    for i in range(steps):
        t, t_next = i / steps, (i + 1) / steps
        here = slope(x, t)
        if method == "heun":
            here = (here + slope(x + (t_next - t) * here, t_next)) / 2
        x = x + (t_next - t) * here
        if progress:
            progress(t_next)
    return x


def _dopri5(
    slope: Callable[[Tensor, Tensor], Tensor], x: Tensor, progress: Progress | None
) -> Tensor:
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise UserError(
            "sampler dopri5 needs torchdiffeq: `pip install diffmoe[ode]`, or choose heun"
        ) from error
    done = 0.0

    def watched(t: Tensor, x: Tensor) -> Tensor:
        nonlocal done
        if progress:
            done = max(done, float(t))  # a rejected step goes back
            progress(done)
        return slope(x, t)

    span = torch.tensor([0.0, 1.0], device=x.device)
    # rtol: SiT has 1e-3; on Gaussian data (test_samplers.py) 1e-4 takes 32 evaluations instead of
    # 20 and ends 50 times nearer to the exact answer. step_t ends a step at t = 1: without it the
    # solver steps past the end, where the network was never trained, and interpolates back.
    options = {"step_t": span[1:]}
    return odeint(watched, x, span, method="dopri5", atol=1e-6, rtol=1e-4, options=options)[-1]


@torch.no_grad()
def sample_ddpm(
    model: Model,
    x_T: Tensor,
    diffusion: GaussianDiffusion,
    steps: int = 250,
    *,
    draw: Callable[[], Tensor],
    method: Literal["ddpm", "ddim"] = "ddpm",
    eta: float = 0.0,
    clip: bool = False,
    progress: Progress | None = None,
) -> Tensor:
    """Walk `steps` evenly spaced steps of `diffusion` from noise x_T to data, (n, C, H, W) fp32.

    model: takes the original timesteps (n,) int64, returns epsilon (n, C, ...), or epsilon and
    variance (n, 2C, ...).
    draw: noise shaped like x_T, called once per step in the order of use, at the last step too
    although that adds none (as the release does): `SampleNoise.draw`, after it gave x_T.
    method: "ddpm" samples p(x_{t-1} | x_t); "ddim" is arXiv 2010.02502, Eq. 12, where `eta` scales
    the noise. DDIM with eta = 0 uses no noise and draws none.
    clip: hold the predicted data to [-1, 1]; DiT and the paper do not.
    """
    if method not in ("ddpm", "ddim"):
        raise UserError(f"diffusion sampler {method!r}: choose 'ddpm' or 'ddim'")
    if eta and method == "ddpm":
        raise UserError(f"eta={eta} belongs to ddim; the ddpm sampler has no such setting")
    spaced = diffusion.respaced(steps)
    x = x_T.float()
    for i in reversed(range(steps)):
        t = torch.full((len(x),), i, device=x.device)
        original = torch.full_like(t, int(spaced.timesteps[i]))
        step = spaced.p_mean_variance(model(x, original), x, t, clip)
        if method == "ddpm":
            mean, deviation = step.mean, torch.exp(0.5 * step.log_variance)
        else:
            mean, deviation = _ddim_step(spaced, step.pred_data, x, t, i, eta)
        if method == "ddpm" or eta:
            noise = draw().to(x)
            if i > 0:
                mean = mean + deviation * noise
        x = mean
        if progress:
            progress(1 - i / steps)
    return x


def _ddim_step(
    diffusion: GaussianDiffusion, pred_data: Tensor, x: Tensor, t: Tensor, i: int, eta: float
) -> tuple[Tensor, float]:
    """Mean (n, C, H, W) and deviation of step i (arXiv 2010.02502, Eq. 12 and 16)."""
    here = float(diffusion.alphas_cumprod[i])
    there = float(diffusion.alphas_cumprod_prev[i])
    sigma = eta * ((1 - there) / (1 - here) * (1 - here / there)) ** 0.5
    epsilon = diffusion.epsilon_from_data(pred_data, x, t)  # not the model's own, if it was clipped
    mean = there**0.5 * pred_data + (1 - there - sigma**2) ** 0.5 * epsilon
    return mean, sigma
