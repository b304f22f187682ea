"""What Muon adds to a step: Newton-Schulz of all matrices."""

from collections.abc import Callable

import torch

from diffmoe.config import Config
from diffmoe.models.dit import DiT
from diffmoe.models.matrices import hidden_matrices
from diffmoe.parallel.orthogonalize import orthogonalize

NEWTON_SCHULZ = "Newton-Schulz"


def newton_schulz(config: Config, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Of all matrices of the network, as one rank alone does it."""
    with torch.device("meta"):
        stacks = hidden_matrices(DiT(config.model, config.moe)).values()
    muon, largest = config.optimizer.muon, max(stack.number * stack.size for stack in stacks)
    values = torch.randn(largest, device=device)

    def work() -> None:
        for stack in stacks:
            given = values[: stack.number * stack.size].view(-1, stack.rows, stack.columns)
            orthogonalize(given, muon.steps, muon.newton_schulz, dtype)

    return work
