"""From what a file holds to what the model is fed: flip, posterior draw, scale and shift."""

import numpy as np
import torch
from torch import Tensor

from diffmoe.data.manifest import Manifest


def model_latents(
    arrays: list[np.ndarray],
    flips: list[np.ndarray] | None,
    manifest: Manifest,
    generator: torch.Generator,
) -> Tensor:
    """The model's latents of n samples, fp32 (n,C,H,W).

    arrays: n arrays (C,H,W), or moments (2C,H,W), as the files hold them.
    flips: the same of the mirrored images; each is taken with probability 1/2.
    All draws of the n samples come from `generator`. The arithmetic is numpy's, in one thread, so
    that its rounding cannot depend on how many threads a worker or the trainer has.
    """
    n = len(arrays)
    if flips is not None:
        mirrored = (torch.rand(n, generator=generator) < 0.5).tolist()
        arrays = [flips[i] if mirrored[i] else arrays[i] for i in range(n)]
    z = np.stack(arrays).astype(np.float32)
    if manifest.content != "sample":
        mean, spread = np.split(z, 2, axis=1)
        if manifest.content == "mean_logvar":
            # The clamp of diffusers' DiagonalGaussianDistribution.
            spread = np.exp(np.float32(0.5) * np.clip(spread, -30, 20))
        z = mean + spread * torch.randn(n, *manifest.shape, generator=generator).numpy()
    if not manifest.scaled:
        z = (z - _per_channel(manifest.shift)) * _per_channel(manifest.scale)
    return torch.from_numpy(z)


def _per_channel(value: float | list[float]) -> np.ndarray:
    """A number, or one per channel, as (C or 1,1,1)."""
    return np.asarray(value, dtype=np.float32).reshape(-1, 1, 1)
