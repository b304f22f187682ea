"""KID: the squared maximum mean discrepancy under a cubic kernel, without a Gaussian's bias."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.seeding import keyed_generator

SUBSETS, SUBSET_SIZE = 100, 1000  # torch-fidelity's


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets, and how many each drew."""

    mean: float
    spread: float
    subset_size: int


def kernel_distance(
    a: Tensor, b: Tensor, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> KernelDistance:
    """Mean of the unbiased estimate over random subsets (arXiv 1801.01401).

    a, b: (n, d) and (m, d). Subsets are no larger than the smaller set; the draws are keyed by the
    seed. The spread is that over subsets, as torch-fidelity gives it, not an error of the mean.
    """
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise UserError(f"KID of {len(a)} and {len(b)} images: give at least 2 of each")
    a, b = a.double(), b.double()
    generator = keyed_generator(seed, "kid")
    values = []
    for _ in range(subsets):
        some_a = a[torch.randperm(len(a), generator=generator)[:size].to(a.device)]
        some_b = b[torch.randperm(len(b), generator=generator)[:size].to(b.device)]
        values.append(unbiased_mmd(some_a, some_b))
    found = torch.stack(values)
    return KernelDistance(float(found.mean()), float(found.std(correction=0)), size)


def unbiased_mmd(a: Tensor, b: Tensor) -> Tensor:
    """MMD^2 of two (n, d) under k(x, y) = (x.y / d + 1)^3; no vector is paired with itself."""
    n, d = a.shape

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / d + 1) ** 3

    own = sum(k.sum() - k.diagonal().sum() for k in (kernel(a, a), kernel(b, b)))
    return own / (n * (n - 1)) - 2 * kernel(a, b).mean()
