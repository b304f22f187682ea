"""Expert Race (arXiv 2503.16057): the best pairs of token and expert of the whole pool."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.models import routing
from diffmoe.models.moe import LayerRouting, Scored
from diffmoe.models.routing import Assignment
from diffmoe.models.thresholded import ThresholdedMoE
from diffmoe.parallel.pool import TokenPool
from diffmoe.parallel.topology import Topology


class ExpertRace(ThresholdedMoE):
    """Of all S * E scores of the pool the S * C largest win: a token gets 0 to E experts.

    At inference a pair is taken where its score reaches a threshold, one for the layer, that
    follows the smallest winner of training. The router has a hidden layer, from which, with
    moe.target_loss_weight, a head predicts the objective's target, too (per-layer regularization).
    """

    routing_parts = (*ThresholdedMoE.routing_parts, "router_hidden")
    thresholds: Tensor

    def __init__(self, model: ModelConfig, moe: MoEConfig, topology: Topology) -> None:
        super().__init__(model, moe, topology)
        self.router_hidden = nn.Linear(model.width, model.width)
        self.target_head: nn.Linear | None = None
        if moe.target_loss_weight:
            self.target_head = nn.Linear(model.width, model.patch_size**2 * model.in_channels)
        self.register_buffer("thresholds", torch.zeros(1))

    @property
    def tracked(self) -> Tensor:
        return self.thresholds

    def wanted(self, logits_SE: Tensor) -> Tensor:
        """logits_SE: the scores to choose by."""
        if self.calibrated_E is not None:
            return logits_SE > self.calibrated_E
        return logits_SE >= self.thresholds

    def move(self, seen_X: Tensor) -> None:
        self.thresholds.lerp_(seen_X.to(self.thresholds.dtype), 1 - self.moe.threshold_ema)

    def _hidden(self, tokens_SD: Tensor) -> Tensor:
        tokens_SD = tokens_SD.to(self.router_hidden.weight.dtype)
        return F.gelu(self.router_hidden(tokens_SD), approximate="tanh")

    def _select(self, scored: Scored) -> tuple[Assignment, LayerRouting]:
        ranked_SE = scored.ranked_SE
        if not self.training and self.inference != "static":
            return self._by_threshold(scored, ranked_SE)
        tokens, experts = ranked_SE.shape
        # Token by token, so that equal scores fall to the lower rank, then to the lower token.
        pairs_1N = ranked_SE.reshape(1, -1)
        if not self.training:
            winners = self._winners(tokens, self.capacity)
            selected_ES = routing.top_k_mask(pairs_1N, winners).view(tokens, experts).t()
            assignment = routing.ragged_assignment(selected_ES, scored.gates_SE, winners)
            return assignment, LayerRouting(selected_ES, ranked_SE)
        winners = self._winners(tokens * self.pool.ranks, self.moe.capacity)
        kth_1 = self.pool.kth_largest(pairs_1N, winners)
        ties_1 = self.pool.ties(pairs_1N, kth_1, winners)
        selected_ES = routing.select_largest(pairs_1N, kth_1, ties_1).view(tokens, experts).t()
        known = winners if self.pool.ranks == 1 else None  # how many of a wider pool are here
        assignment = routing.ragged_assignment(selected_ES, scored.gates_SE, known)
        losses = {}
        if self.moe.similarity_loss_weight:
            losses["similarity"] = router_similarity(scored.logits_SE, selected_ES, self.pool)
        target_BTP = None
        if self.target_head is not None:
            target_SP = self.target_head(scored.hidden_SD.to(self.target_head.weight.dtype))
            target_BTP = target_SP.unflatten(0, (-1, scored.tokens_per_sample))
        return assignment, LayerRouting(selected_ES, ranked_SE, losses, kth_1, target_BTP)

    def _winners(self, tokens: int, capacity: float) -> int:
        """How many pairs are taken: S * C, at least one."""
        experts = self.moe.experts
        return routing.expert_capacity(
            tokens * experts, experts, capacity, self.moe.capacity_rounding
        )


def router_similarity(logits_SE: Tensor, selected_ES: Tensor, pool: TokenPool) -> Tensor:
    """The router similarity loss: experts that are chosen together should score alike less often.

    The sum of W * (P^T P) / S with P the softmax over experts, where W weighs each pair of experts
    by how many tokens of the pool both take, diagonal and rest normalized apart; no gradient of W.
    """
    S, E = logits_SE.shape
    probabilities_SE = logits_SE.softmax(dim=-1)
    taken_ES = selected_ES.to(probabilities_SE.dtype)
    together_EE = pool.sum(taken_ES @ taken_ES.t())
    own_E = together_EE.diagonal()
    others_EE = together_EE - own_E.diag()
    weights_EE = (own_E * (E / own_E.sum())).diag()
    # Where no token has two experts, there are no pairs to weigh.
    weights_EE = weights_EE + others_EE * ((E * E - E) / others_EE.sum().clamp(min=1))
    return (weights_EE * (probabilities_SE.t() @ probabilities_SE)).sum() / S
