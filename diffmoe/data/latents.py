"""From the arrays of the files to the latents that the model sees.

Number types of the files, mirroring, the draw from the posterior, scale and shift.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffmoe.data.captions import Captions
from diffmoe.data.manifest import FeatureContent, Manifest


class Sample(NamedTuple):
    """One sample as its shard holds it.

    array: the latent (C,H,W) or the moments (2C,H,W) of its posterior.
    flip: the same of the mirrored image, None without flips.
    captions: None where they are not read, or there are none.
    features: of an image encoder, (Z,h,w) float16 of the image and, with flips, of its mirror
        image; empty where they are not read, or there are none.
    """

    key: str
    label: int
    array: np.ndarray
    flip: np.ndarray | None = None
    captions: Captions | None = None
    features: tuple[np.ndarray, ...] = ()


class NotFinite(ValueError):
    """NaN or infinity in the `index`-th of the arrays."""

    def __init__(self, index: int):
        super().__init__(f"array {index} is not finite")
        self.index = index


def to_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """An fp32 array in a manifest's dtype, rounded to nearest even.

    dtype: "float16", "bfloat16" (its bits as uint16), "float32", or "uint8" for pixels in -1..1.
    Values too large for float16 become infinite.
    """
    if dtype == "uint8":
        return np.round((array + 1) * np.float32(127.5)).clip(0, 255).astype(np.uint8)
    if dtype == "bfloat16":
        return torch.from_numpy(array).to(torch.bfloat16).view(torch.uint16).numpy()
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def from_stored(array: np.ndarray, dtype: str | None) -> np.ndarray:
    """An array of a file as fp32. dtype: the manifest's."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    numbers = array.astype(np.float32)
    if dtype == "uint8":
        numbers /= 127.5
        numbers -= 1
    return numbers


def stored_types(dtype: str | None) -> tuple[np.dtype, ...]:
    """The numpy types that an npy file may have under a manifest's dtype."""
    if dtype is None:
        return (np.dtype("float16"), np.dtype("float32"))
    return (np.dtype("uint16" if dtype == "bfloat16" else dtype),)


def check_features(array: np.ndarray, content: FeatureContent) -> None:
    """Raise ValueError for an array that does not fit the manifest's `features`."""
    if array.dtype != np.float16 or array.shape != content.shape:
        raise ValueError(
            f"it is {array.dtype} {array.shape}, but the manifest's features say float16 "
            f"{content.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError("it contains NaN or infinity")


def draw_mirrored(n: int, manifest: Manifest, generator: torch.Generator) -> list[bool]:
    """Which of n samples are mirrored: each with probability 1/2, none without flips."""
    if not manifest.flips:
        return [False] * n
    return (torch.rand(n, generator=generator) < 0.5).tolist()


def model_latents(
    arrays: list[np.ndarray], manifest: Manifest, generator: torch.Generator
) -> Tensor:
    """The model's latents of n samples, fp32 (n,C,H,W). Raises NotFinite.

    arrays: n arrays (C,H,W), or moments (2C,H,W), as the files hold them.
    generator: for the draws from the posteriors.
    The arithmetic is numpy's, in one thread: its rounding must not depend on how many threads a
    worker or the trainer has.
    """
    z = from_stored(np.stack(arrays), manifest.dtype)
    if not np.isfinite(z).all():
        raise NotFinite(int(np.isfinite(z).all((1, 2, 3)).argmin()))
    # In place from here on: allocating costs more time than the arithmetic.
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
