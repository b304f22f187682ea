"""Improved precision and recall (arXiv 1904.06991), as ADM and torch-fidelity define them."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffmoe.errors import UserError

NEIGHBOURS = 3
_BLOCK = 1 << 25  # distances at a time: 128 MB


def precision_and_recall(
    samples: Tensor, reference: Tensor, neighbors: int = NEIGHBOURS
) -> tuple[float, float]:
    """Shares of samples within the reference's manifold, and of the reference within theirs.

    samples, reference: (n, d), (m, d). A set's manifold is the union of balls about its vectors,
    each as far as its k-th nearest other vector, edge included. Distances are Euclidean, float32.
    A block of them is in memory at a time.
    """
    for name, features in (("samples", samples), ("reference", reference)):
        if len(features) <= neighbors:
            raise UserError(
                f"precision and recall with {neighbors} neighbors: {len(features)} {name}; give "
                f"at least {neighbors + 1}"
            )
    center = reference.float().mean(0)  # near the origin, the squares below lose fewer digits
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
    """Of `points`, those in any ball."""
    inside = sum(int((squared <= radii).any(1).sum()) for _, squared in _blocks(points, centers))
    return inside / len(points)


def _blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The first row and the squared distances of blocks of rows to all columns."""
    step = max(1, _BLOCK // len(columns))
    lengths = columns.square().sum(1)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        squared = torch.addmm(
            some.square().sum(1, keepdim=True) + lengths, some, columns.T, alpha=-2
        )
        yield start, squared.clamp_(min=0)
