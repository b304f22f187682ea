"""What this machine's own matrix products and copies take: what the model is held against."""

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


def copying(size: int, device: torch.device) -> tuple[Callable[[], object], int]:
    """A copy of `size` bytes within the device's memory, and how many it reads and writes."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * size


def expert_products(
    experts: int, tokens: int, width: int, hidden: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], object]:
    """The six products of E expert MLPs' forward and backward, batched, K = tokens rows an expert.

    The operations are those of one MLP over all rows, but every expert's weights are read twice and
    its gradients written: with few rows an expert, memory sets the time.
    """
    rows = torch.randn(experts, tokens, width, dtype=dtype, device=device)
    inside = torch.randn(experts, tokens, hidden, dtype=dtype, device=device)
    w_in = torch.randn(experts, width, hidden, dtype=dtype, device=device)
    w_out = torch.randn(experts, hidden, width, dtype=dtype, device=device)

    def work() -> object:
        return (
            rows @ w_in,
            inside @ w_out,
            rows @ w_out.mT,
            inside @ w_in.mT,
            rows.mT @ inside,
            inside.mT @ rows,
        )

    return work
