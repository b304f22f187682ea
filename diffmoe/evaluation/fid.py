"""The Frechet distance of two Gaussians: FID on Inception's features, FD on any others."""

import torch
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.evaluation.moments import Gaussian


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (arXiv 1706.08500, Eq. 6), in float64.

    The root's trace is that of the symmetric (A^(1/2) B A^(1/2))^(1/2), which is real by
    construction, so singular covariances need no offset on the diagonal. Computes two
    eigendecompositions. Raises UserError if the sizes differ or a number is not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features of {len(a.mean)} and {len(b.mean)} numbers cannot be compared; use "
            "those of the same extractor"
        )
    for one in (a, b):
        if not (one.mean.isfinite().all() and one.covariance.isfinite().all()):
            raise UserError("the features' mean or covariance is not finite")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b.covariance @ root
    crossed = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    traces: Tensor = a.covariance.trace() + b.covariance.trace()
    distance = float((a.mean - b.mean).square().sum() + traces - 2 * crossed)
    # Only rounding makes it negative.
    return max(distance, 0.0)


def too_few(name: str, gaussian: Gaussian) -> str | None:
    """A warning if there are too few images for a regular covariance, else None."""
    size = len(gaussian.mean)
    if gaussian.number is None or gaussian.number > size:
        return None
    return (
        f"{name}: {gaussian.number} images for {size} features: the covariance is singular and the "
        "distance biased upwards; compare it only with distances of the same number"
    )
