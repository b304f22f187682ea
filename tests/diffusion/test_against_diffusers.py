"""DDPM and DDIM against the schedulers of diffusers, step by step on the same noise."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffmoe.diffusion.ddpm import GaussianDiffusion
from diffmoe.diffusion.samplers import sample_ddpm

pytest.importorskip("diffusers")

STEPS = 20
SHAPE = (2, 3, 4, 4)
BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}


def model(x: Tensor, t: Tensor) -> Tensor:
    """Epsilon near x, and a variance that depends on both."""
    time = torch.cos(t.float() / 300).view(-1, 1, 1, 1)
    return torch.cat([0.9 * x + 0.1 * time, torch.tanh(x) * time], 1)


def noises(n: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(SHAPE, generator=generator) for _ in range(n)]


def test_ddpm_with_learned_variance_equals_diffusers(monkeypatch):
    from diffusers import DDPMScheduler
    from diffusers.schedulers import scheduling_ddpm

    x, *steps = noises(STEPS + 1)
    ours = sample_ddpm(model, x, GaussianDiffusion(), STEPS, draw=iter(steps).__next__)

    scheduler = DDPMScheduler(1000, **BETAS, variance_type="learned_range", clip_sample=False)
    times = GaussianDiffusion().respaced(STEPS).timesteps.flip(0).tolist()
    scheduler.set_timesteps(timesteps=times)
    for t, noise in zip(times, steps, strict=True):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, n=noise, **__: n)
        x = scheduler.step(model(x, torch.full((2,), t)), t, x).prev_sample
    # fp32 on both sides, tables in fp32 on theirs.
    assert_close(ours, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_equals_diffusers(eta, monkeypatch):
    from diffusers import DDIMScheduler

    x, *steps = noises(STEPS + 1)
    draw = iter(steps).__next__
    scheduler = DDIMScheduler(
        1000, **BETAS, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(STEPS)
    # Their DDIM takes the step before as t - 1000 / STEPS: equal spacing, ours is DiT's.
    spaced = GaussianDiffusion().respaced(sorted(scheduler.timesteps.tolist()))
    monkeypatch.setattr(GaussianDiffusion, "respaced", lambda self, _: spaced)
    ours = sample_ddpm(
        lambda x, t: model(x, t)[:, :3],
        x,
        GaussianDiffusion(),
        STEPS,
        draw=draw,
        method="ddim",
        eta=eta,
    )
    for t, noise in zip(scheduler.timesteps.tolist(), steps, strict=True):
        epsilon = model(x, torch.full((2,), t))[:, :3]
        x = scheduler.step(epsilon, t, x, eta=eta, variance_noise=noise).prev_sample
    assert_close(ours, x, rtol=1e-4, atol=1e-4 * float(x.abs().max()))
