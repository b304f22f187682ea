"""From noise to data: Euler, Heun, dopri5 and an SDE for flows, DDPM and DDIM for diffusion.

A model is a callable of (x, t); guidance.py makes one from a network and a condition. `progress` is
called with the fraction of the trajectory that is done.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from diffmoe.diffusion.ddpm import GaussianDiffusion
from diffmoe.diffusion.flow import shifted
from diffmoe.errors import UserError
from diffmoe.seeding import keyed_generator

Model = Callable[[Tensor, Tensor], Tensor]
Progress = Callable[[float], None]


class SampleNoise:
    """Noise of the samples `indices` of one seed; it does not depend on how they are batched.

    Each sample has its own generator, keyed (seed, "sample", index). The first draw is the initial
    noise, the later ones are those of the sampler's steps.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, ...]) -> None:
        self._generators = [keyed_generator(seed, "sample", int(index)) for index in indices]
        self._shape = tuple(shape)

    def draw(self) -> Tensor:
        """The next standard normal numbers, (n, *shape) fp32 on the CPU."""
        return torch.stack([torch.randn(self._shape, generator=g) for g in self._generators])


@torch.no_grad()
def sample_flow(
    velocity: Model,
    noise: Tensor,
    steps: int = 250,
    method: Literal["euler", "heun", "dopri5", "sde"] = "euler",
    shift: float = 1.0,
    *,
    draw: Callable[[], Tensor] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Follow dx/dt = velocity(x, t) from noise at t = 0 to data at t = 1, both (n, C, H, W) fp32.

    velocity: takes t (n,) fp32 and returns (n, C, H, W).
    steps: intervals of `time_grid`; euler and sde take one evaluation for each, heun two. dopri5
    ignores it and chooses its own steps by the error over the whole batch: a sample then depends on
    the rest of its batch, within the tolerance.
    draw: gives noise shaped like x; sde needs it, once for each step but the last.
    Raises UserError for settings that do not fit.
    """
    if method not in ("euler", "heun", "dopri5", "sde"):
        raise UserError(f"flow sampler {method!r}: choose 'euler', 'heun', 'dopri5' or 'sde'")
    x = noise.float()

    def slope(x: Tensor, t: float | Tensor) -> Tensor:
        if isinstance(t, Tensor):  # dopri5's, on the device; expanding it waits for nothing
            t_n = t.float().expand(len(x)).contiguous()
        else:
            t_n = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
        return velocity(x, t_n).float()

    if method == "dopri5":
        return _dopri5(slope, x, progress)
    if steps < (2 if method == "sde" else 1):
        raise UserError(f"{steps} sampling steps: {method} needs at least {1 + (method == 'sde')}")
    if method == "sde":
        if draw is None:
            raise ValueError("sampler sde needs draw, which gives the noise of its steps")
        return _euler_maruyama(slope, x, steps, shift, draw, progress)
    for t, t_next in pairwise(time_grid(steps, shift)):
        here = slope(x, t)
        if method == "heun":
            here = (here + slope(x + (t_next - t) * here, t_next)) / 2
        x = x + (t_next - t) * here
        if progress:
            progress(t_next)
    return x


def time_grid(steps: int, shift: float = 1.0) -> list[float]:
    """steps + 1 times from 0 (noise) to 1 (data).

    shift: 1 spaces them equally; above 1, more of the steps are at high noise (flow.shifted).
    """
    if not shift > 0:
        raise UserError(f"shift={shift}: must be above 0; 1 spaces the steps equally")
    shares = [1 - i / steps for i in range(steps + 1)]
    return [1 - shifted(share, shift) for share in shares]


def _euler_maruyama(
    slope: Callable[[Tensor, float], Tensor],
    x: Tensor,
    steps: int,
    shift: float,
    draw: Callable[[], Tensor],
    progress: Progress | None,
) -> Tensor:
    """SiT's reverse SDE (arXiv 2401.08740, Eq. 5), which has the flow's marginals.

    dx = (v + w * score) dt + sqrt(2 w) dW with w = 1 - t, the noise's share, and
    score = (t v - x) / (1 - t), so that the drift is (1 + t) v - x. It becomes stiff near t = 1, so
    the last step goes there at once, to E[data | x] = x + (1 - t) v.
    """
    last = max(0.04, 1 / steps)  # SiT's length of the last step, or an equal share of few steps
    times = [(1 - last) * t for t in time_grid(steps - 1, shift)]
    for t, t_next in pairwise(times):
        dt = t_next - t
        drift = (1 + t) * slope(x, t) - x
        x = x + dt * drift + (2 * (1 - t) * dt) ** 0.5 * draw().to(x)
        if progress:
            progress(t_next)
    x = x + last * slope(x, 1 - last)
    if progress:
        progress(1.0)
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
    # 20 and is 50 times closer to the exact answer. step_t ends a step at t = 1: without it the
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
    progress: Progress | None = None,
) -> Tensor:
    """Walk `steps` evenly spaced steps of `diffusion` from noise x_T to data, (n, C, H, W) fp32.

    model: takes the original timesteps (n,) int64, returns epsilon (n, C, ...), or epsilon and
    variance (n, 2C, ...).
    draw: gives noise shaped like x_T, such as `SampleNoise.draw`. Called once per step in the order
    of use; also at the last step, which adds none (as the release does).
    method: "ddpm" samples p(x_{t-1} | x_t); "ddim" is arXiv 2010.02502, Eq. 12, where `eta` scales
    the noise. DDIM with eta = 0 uses no noise and draws none.
    Raises UserError for settings that do not fit.
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
        deviation: Tensor | float
        step = spaced.p_mean_variance(model(x, original), x, t)
        if method == "ddpm":
            x, deviation = step.mean, torch.exp(0.5 * step.log_variance)
        else:
            x, deviation = _ddim_step(spaced, step.pred_data, x, t, i, eta)
        if method == "ddpm" or eta:
            noise = draw().to(x)
            if i > 0:
                x = x + deviation * noise
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
    epsilon = diffusion.epsilon_from_data(pred_data, x, t)
    mean = there**0.5 * pred_data + (1 - there - sigma**2) ** 0.5 * epsilon
    return mean, sigma
