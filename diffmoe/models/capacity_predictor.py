"""The capacity predictor: learns which tokens are selected; replaces the pool at inference."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffmoe.models.precision import outside_autocast


class CapacityPredictor(nn.Module):
    """Linear - SiLU - Linear on detached tokens, one logit per expert (Eq. 10, 11).

    thresholds: tau of Eq. 14 and 17, one per expert; starts at 0, as in the release.
    """

    thresholds: Tensor

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, num_experts)
        self.register_buffer("thresholds", torch.zeros(num_experts))

    def forward(self, tokens_SD: Tensor) -> Tensor:
        """Logits (S, E), in fp32 at least. No gradient reaches the tokens."""
        hidden_SD = F.silu(self.hidden(tokens_SD.detach().to(self.hidden.weight.dtype)))
        dtype = torch.promote_types(hidden_SD.dtype, torch.float32)
        weight, bias = self.out.weight.to(dtype), self.out.bias.to(dtype)
        with outside_autocast(hidden_SD):
            return F.linear(hidden_SD.to(dtype), weight, bias)


def capacity_loss(logits_SE: Tensor, selected_ES: Tensor) -> Tensor:
    """Binary cross-entropy against what was selected, mean over tokens, experts (Eq. 12, 13)."""
    return F.binary_cross_entropy_with_logits(logits_SE, selected_ES.t().to(logits_SE.dtype))
