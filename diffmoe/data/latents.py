"""From what a file holds to what the model is fed: flip, posterior draw, scale and shift."""

import numpy as np
import torch
from torch import Tensor

from diffmoe.data.manifest import Manifest
from diffmoe.data.numbers import restored


class NotFinite(ValueError):
    """NaN or infinity in the `index`-th of the arrays."""

    def __init__(self, index: int):
        super().__init__(f"array {index} is not finite")
        self.index = index


def draw_mirrored(n: int, manifest: Manifest, generator: torch.Generator) -> list[bool]:
    """Which of n samples are taken mirrored: each with probability 1/2, none without flips."""
    if not manifest.flips:
        return [False] * n
    return (torch.rand(n, generator=generator) < 0.5).tolist()


def model_latents(
    arrays: list[np.ndarray], manifest: Manifest, generator: torch.Generator
) -> Tensor:
    """The model's latents of n samples, fp32 (n,C,H,W). Raises NotFinite.

    arrays: n arrays (C,H,W), or moments (2C,H,W), as the files hold them.
    The posterior's draws of the n samples come from `generator`. The arithmetic is numpy's, in one
    thread, so that its rounding cannot depend on how many threads a worker or the trainer has.
    """
    z = restored(np.stack(arrays), manifest.dtype)
    if not np.isfinite(z).all():
        raise NotFinite(int(np.isfinite(z).all((1, 2, 3)).argmin()))
    # In place from here on: fresh memory costs more than the arithmetic.
    if manifest.content != "sample":
        z, spread = np.split(z, 2, axis=1)
        if manifest.content == "mean_logvar":
            # The clamp of diffusers' DiagonalGaussianDistribution.
            np.clip(spread, -30, 20, out=spread)
            spread *= np.float32(0.5)
            np.exp(spread, out=spread)
        spread *= torch.randn(len(z), *manifest.shape, generator=generator).numpy()
        z += spread
    if not manifest.scaled:
        z -= _per_channel(manifest.shift)
        z *= _per_channel(manifest.scale)
    return torch.from_numpy(z)


def _per_channel(value: float | list[float]) -> np.ndarray:
    """A number, or one per channel, as (C or 1,1,1)."""
    return np.asarray(value, dtype=np.float32).reshape(-1, 1, 1)
