"""The rate that this machine's own matrix product reaches: what the model is held against."""

from collections.abc import Callable

import torch


def products(
    tokens: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> tuple[Callable[[], object], int]:
    """The three products of one Linear's forward and backward, as plain GEMMs, and their FLOPs."""
    x = torch.randn(tokens, width, dtype=dtype, device=device)
    weight = torch.randn(hidden, width, dtype=dtype, device=device)
    gradient = torch.randn(tokens, hidden, dtype=dtype, device=device)

    def work() -> object:
        return x @ weight.t(), gradient @ weight, gradient.t() @ x

    return work, 3 * 2 * tokens * width * hidden
