"""Improved precision and recall (arXiv 1904.06991), as ADM and torch-fidelity define them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffmoe.errors import UserError

NEIGHBORS = 3
_BLOCK = 1 << 25  # distances at a time: 128 MB


def precision_and_recall(
    samples: Tensor, reference: Tensor, neighbors: int = NEIGHBORS
) -> tuple[float, float]:
    """Precision: the share of samples in the reference's manifold. Recall: the reverse.

    samples, reference: (n, d), (m, d). A set's manifold is the union of closed balls around its
    vectors that reach to the k-th nearest other vector. Distances are Euclidean, in float32; one
    block of them is in memory at a time. Raises UserError for too few vectors.
    """
    for name, features in (("samples", samples), ("reference", reference)):
        if len(features) <= neighbors:
            raise UserError(
                f"precision and recall with {neighbors} neighbors: {len(features)} {name}; give "
                f"at least {neighbors + 1}"
            )
    center = reference.float().mean(0)  # near the origin, squares are more precise
    samples, reference = samples.float() - center, reference.float() - center
    return (
        _share_within(samples, reference, _radii(reference, neighbors)),
        _share_within(reference, samples, _radii(samples, neighbors)),
    )


def _radii(features: Tensor, neighbors: int) -> Tensor:
    """Squared distance to the k-th nearest other vector, (n,)."""
    found = []
    for start, squared in _blocks(features, features):
        rows = torch.arange(len(squared))
        squared[rows, start + rows] = torch.inf  # itself
        found.append(squared.kthvalue(neighbors, dim=1).values)
    return torch.cat(found)


def _share_within(points: Tensor, centers: Tensor, radii: Tensor) -> float:
    """The share of `points` in any ball. radii: squared."""
    inside = sum(int((squared <= radii).any(1).sum()) for _, squared in _blocks(points, centers))
    return inside / len(points)


def _blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of rows: the index of the first one, and their squared distances to all columns."""
    step = max(1, _BLOCK // len(columns))
    lengths = columns.square().sum(1)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        squared = torch.addmm(
            some.square().sum(1, keepdim=True) + lengths, some, columns.T, alpha=-2
        )
        yield start, squared.clamp_(min=0)
