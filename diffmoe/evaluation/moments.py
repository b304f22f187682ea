"""Mean and covariance of features, accumulated over batches in float64."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.errors import UserError


class Gaussian(NamedTuple):
    """Mean (d,) and unbiased covariance (d,d), float64, of `number` feature vectors.

    number: None if a stored file does not have it.
    """

    mean: Tensor
    covariance: Tensor
    number: int | None


class Moments:
    """Accumulates sums: d^2 numbers, however many vectors.

    The sums are relative to the first batch's mean, so that a large mean costs no precision.
    """

    def __init__(self) -> None:
        self.number = 0
        self._origin = self._sum = self._outer = torch.zeros(0)

    def add(self, features: Tensor) -> None:
        """features: (n, d), any float type."""
        features = features.double()
        if not self.number:
            self._origin = features.mean(0)
            self._sum = torch.zeros_like(self._origin)
            self._outer = self._sum.new_zeros(len(self._sum), len(self._sum))
        centered = features - self._origin
        self.number += len(features)
        self._sum += centered.sum(0)
        self._outer.addmm_(centered.T, centered)

    def gaussian(self) -> Gaussian:
        """Mean and covariance, on the CPU. Raises UserError for fewer than two vectors."""
        if self.number < 2:
            raise UserError(f"{self.number} image(s) have no covariance; give at least 2")
        mean = self._sum / self.number
        outer = self._outer - self.number * torch.outer(mean, mean)
        return Gaussian((mean + self._origin).cpu(), outer.cpu() / (self.number - 1), self.number)
