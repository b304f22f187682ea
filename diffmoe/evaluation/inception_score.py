"""Inception score over splits (arXiv 1606.03498), from batches of probabilities."""

import torch
from torch import Tensor

SPLIT_SIZE = 5000  # ADM's


class InceptionScore:
    """exp of the mean KL of p(y|x) from p(y) in each split of consecutive images, then the mean.

    As in ADM's evaluator: splits of 5,000; the last one may be smaller, with the same weight. A
    score grows with the split's size, so scores of other numbers of images do not compare.
    """

    def __init__(self, split_size: int = SPLIT_SIZE) -> None:
        self.split_size = split_size
        self._numbers: list[int] = []
        self._sums: list[Tensor] = []
        self._negative_entropies: list[float] = []

    def add(self, probabilities: Tensor) -> None:
        """probabilities: (n, classes), each row sums to 1."""
        rest = probabilities.double().cpu()
        while len(rest):
            if not self._numbers or self._numbers[-1] == self.split_size:
                self._numbers.append(0)
                self._sums.append(torch.zeros(rest.shape[1], dtype=torch.float64))
                self._negative_entropies.append(0.0)
            some, rest = rest.tensor_split([self.split_size - self._numbers[-1]])
            self._numbers[-1] += len(some)
            self._sums[-1] += some.sum(0)
            self._negative_entropies[-1] += float(torch.xlogy(some, some).sum())

    def read(self) -> tuple[float, float]:
        """The mean over the splits and its standard deviation."""
        scores = []
        for n, total, entropy in zip(
            self._numbers, self._sums, self._negative_entropies, strict=True
        ):
            marginal = total / n
            scores.append(entropy / n - float(torch.xlogy(marginal, marginal).sum()))
        found = torch.tensor(scores, dtype=torch.float64).exp()
        return float(found.mean()), float(found.std(correction=0))
