"""DSMoE (arXiv 2512.01252): token choice by sigmoid scores, balanced by a bias."""

import torch
from torch import Tensor

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.models import routing
from diffmoe.models.moe import LayerRouting, MoEFeedForward, Scored
from diffmoe.models.routing import Assignment
from diffmoe.parallel.topology import Topology


class DSMoE(MoEFeedForward):
    """Tokens take the moe.top_k experts of the largest score plus bias; gates leave the bias out.

    A token's gates are its chosen scores over their sum, times moe.gate_scale; a single one stays
    as it is. After each step the bias of an expert with less than the mean load grows by
    moe.balance_rate, and falls for one with more (DeepSeek-V3, arXiv 2412.19437, section 2.1.2;
    DSMoE's release leaves it at zero, which moe.balance_rate=0 does).
    """

    selection_bias: Tensor

    def __init__(self, model: ModelConfig, moe: MoEConfig, topology: Topology) -> None:
        super().__init__(model, moe, topology)
        self.register_buffer("selection_bias", torch.zeros(moe.experts))

    def move(self, seen_X: Tensor) -> None:
        """seen_X: how many tokens each expert took."""
        direction_E = (seen_X.mean() - seen_X).sign()
        self.selection_bias.add_(direction_E.to(self.selection_bias), alpha=self.moe.balance_rate)

    def _select(self, scored: Scored) -> tuple[Assignment, LayerRouting]:
        selected_ES = routing.token_choice_mask(
            scored.ranked_SE + self.selection_bias, self.moe.top_k
        )
        gates_SE = scored.gates_SE
        if self.moe.top_k > 1:
            chosen_SE = gates_SE * selected_ES.t()
            total_S1 = chosen_SE.sum(dim=1, keepdim=True) / self.moe.gate_factor
            gates_SE = chosen_SE / (total_S1 + 1e-20)
        pairs = len(scored.tokens_SD) * self.moe.top_k
        assignment = routing.ragged_assignment(selected_ES, gates_SE, pairs)
        if not self.training:
            return assignment, LayerRouting(selected_ES)
        loads_E = selected_ES.sum(dim=1).double()
        return assignment, LayerRouting(selected_ES, seen_X=loads_E)
