"""The Frechet distance of two Gaussians: FID on Inception's features, FD on any others."""

import torch
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.evaluation.moments import Gaussian


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)) (arXiv 1706.08500, Eq. 6), in float64.

    The trace of the root is that of the symmetric (A^(1/2) B A^(1/2))^(1/2): real by construction,
    and nothing is added to a diagonal where a covariance is singular. Takes two symmetric
    eigendecompositions. Raises UserError where the sizes differ or a number is not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features of {len(a.mean)} and of {len(b.mean)} numbers have no distance; take the "
            "reference of the same extractor"
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
    # Rounding of equal Gaussians; more than that cannot come out.
    return max(distance, 0.0)


def too_few(name: str, gaussian: Gaussian) -> str | None:
    """What to warn of where a covariance is singular for want of images; else None."""
    size = len(gaussian.mean)
    if gaussian.number is None or gaussian.number > size:
        return None
    return (
        f"{name}: {gaussian.number} images for {size} features: the covariance is singular and the "
        "distance biased upwards; compare it only with figures of the same number"
    )
