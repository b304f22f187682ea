"""KID (arXiv 1801.01401): squared maximum mean discrepancy with a cubic kernel, unbiased."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.seeding import keyed_generator

SUBSETS, SUBSET_SIZE = 100, 1000  # as in torch-fidelity
_BLOCK = 1 << 24  # kernel values in memory at a time


class KernelDistance(NamedTuple):
    """Mean and standard deviation over subsets, and the size of a subset."""

    mean: float
    spread: float
    subset_size: int


def kernel_distance(
    a: Tensor, b: Tensor, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> KernelDistance:
    """Mean of the unbiased estimate over random subsets (arXiv 1801.01401).

    a, b: (n, d) and (m, d). Subsets are at most as large as the smaller set, and drawn by `seed`.
    The spread is that over subsets, as in torch-fidelity, not the error of the mean. Raises
    UserError for fewer than 2 vectors.
    """
    size = min(subset_size, len(a), len(b))
    if size < 2:
        raise UserError(f"KID of {len(a)} and {len(b)} images: give at least 2 of each")
    a, b = a.double(), b.double()
    generator = keyed_generator(seed, "kid")

    def draw(x: Tensor) -> Tensor:
        return torch.randperm(len(x), generator=generator)[:size].to(x.device)

    draws = [(draw(a), draw(b)) for _ in range(subsets)]
    pairs = len(a) ** 2 + len(b) ** 2 + len(a) * len(b)
    if pairs <= 3 * size**2 * subsets:
        found = _from_all_pairs(a, b, draws)
    else:  # a large set, of which the subsets use little
        found = torch.stack([unbiased_mmd(a[some_a], b[some_b]) for some_a, some_b in draws])
    return KernelDistance(float(found.mean()), float(found.std(correction=0)), size)


def unbiased_mmd(a: Tensor, b: Tensor) -> Tensor:
    """MMD^2 of two sets (n, d) with k(x, y) = (x.y / d + 1)^3, without pairs of one vector."""
    n = len(a)
    own = sum(k.sum() - k.diagonal().sum() for k in (kernel(a, a), kernel(b, b)))
    return own / (n * (n - 1)) - 2 * kernel(a, b).mean()


def kernel(x: Tensor, y: Tensor) -> Tensor:
    """Kernel values (n, m) of vectors (n, d) and (m, d)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def _from_all_pairs(a: Tensor, b: Tensor, draws: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`unbiased_mmd` of each draw (subsets,), from kernel values that are computed once."""
    n = len(draws[0][0])
    in_a, in_b = (
        x.new_zeros(len(x), len(draws)).scatter(0, torch.stack(some, dim=1), 1.0)
        for x, some in zip((a, b), zip(*draws, strict=True), strict=True)
    )
    own = _sums(a, a, in_a, in_a) + _sums(b, b, in_b, in_b)
    for x, in_x in ((a, in_a), (b, in_b)):
        own = own - ((x.square().sum(1) / x.shape[1] + 1) ** 3) @ in_x  # pairs of one vector
    return own / (n * (n - 1)) - 2 * _sums(a, b, in_a, in_b) / n**2


def _sums(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """The sum of kernel values over each subset's pairs (subsets,), some rows at a time.

    in_x, in_y: (n, subsets), 1 where the subset has the vector.
    """
    rows = max(1, _BLOCK // len(y))
    return sum(
        ((kernel(some, y) @ in_y) * in_some).sum(0)
        for some, in_some in zip(x.split(rows), in_x.split(rows), strict=True)
    )
