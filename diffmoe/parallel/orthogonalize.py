"""Newton-Schulz: the orthogonal matrix nearest to each of a stack, by products of matrices alone.

The quintic iteration of Muon (Jordan et al., https://kellerjordan.github.io/posts/muon/), as in
torch.optim.Muon: singular values end between about 0.7 and 1.2, which is near enough for an update.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315  # x -> A x + B x^3 + C x^5, of each singular value
SMALLEST = 1e-7  # norm that a matrix is divided by at least

Method = Literal["standard", "gram"]
Scale = Literal["match_rms_adamw", "original"]


class Matrices(NamedTuple):
    """A parameter seen as `number` matrices that lie one after the other.

    rows, columns: of each, as stored. inputs_first: stored (in, out), as experts are, and not
    (out, in), as torch's linear layers are.
    """

    number: int
    rows: int
    columns: int
    inputs_first: bool

    @property
    def size(self) -> int:
        """Elements of one matrix."""
        return self.rows * self.columns

    def factor(self, scale: Scale) -> float:
        """What an orthogonal update is multiplied by.

        match_rms_adamw: 0.2 sqrt(max(in, out)), about the size of AdamW's update (Moonlight,
        arXiv 2502.16982, Eq. 4). original: sqrt(max(1, out / in)) (Jordan et al.).
        """
        if scale == "match_rms_adamw":
            return 0.2 * max(self.rows, self.columns) ** 0.5
        fan_in, fan_out = self.rows, self.columns
        if not self.inputs_first:
            fan_in, fan_out = fan_out, fan_in
        return max(1.0, fan_out / fan_in) ** 0.5


def orthogonalize(
    matrices_NRC: Tensor, steps: int, method: Method, dtype: torch.dtype | None = None
) -> Tensor:
    """Each of N matrices U diag(s) V^T becomes U diag(f(s / |s|)) V^T, f the iterated quintic.

    dtype: of the products; default that of the matrices. Returns (N, R, C) in it.
    """
    tall = matrices_NRC.shape[-2] > matrices_NRC.shape[-1]
    x = matrices_NRC.mT if tall else matrices_NRC
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=SMALLEST)
    x = x.to(dtype or x.dtype)
    square = x.shape[-2] == x.shape[-1]
    x = _standard(x, steps) if method == "standard" or square else _gram(x, steps)
    return x.mT if tall else x


def _standard(x: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x


def _gram(x: Tensor, steps: int) -> Tensor:
    """The same, most products of the smaller side (https://tridao.me/blog/2026/gram-newton-schulz).

    A step is x -> P x with P a polynomial of x x^T, so several steps can do without x.
    """
    for run in _runs(steps):
        gram = product = x @ x.mT
        for step in range(run):
            factor = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
            factor.diagonal(dim1=-2, dim2=-1).add_(A)
            product = factor @ product if step else factor
            if step < run - 1:
                gram = factor @ (factor @ gram)
        x = product @ x
    return x


def _runs(steps: int) -> list[int]:
    """2, 3, 3, ...: rounding makes x x^T indefinite, which grows with each step done without x."""
    runs = [min(2, steps)]
    while sum(runs) < steps:
        runs.append(min(3, steps - sum(runs)))
    return runs


def flops(matrices: Matrices, steps: int, method: Method) -> int:
    """Of the products of `orthogonalize`; a multiply-add counts as two."""
    small, large = sorted((matrices.rows, matrices.columns))
    whole, inner = 2 * small**2 * large, 2 * small**3
    if method == "standard" or small == large:
        return matrices.number * steps * (2 * whole + inner)
    return matrices.number * sum(2 * whole + (4 * run - 3) * inner for run in _runs(steps))
