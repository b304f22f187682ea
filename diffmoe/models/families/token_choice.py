"""Token choice (TC-DiT): every token takes its best experts, with a load balancing loss."""

from diffmoe.models import routing
from diffmoe.models.moe import LayerRouting, MoEFeedForward, Scored
from diffmoe.models.routing import Assignment


class TokenChoice(MoEFeedForward):
    """moe.top_k experts for each token; nothing is dropped."""

    def _select(self, scored: Scored) -> tuple[Assignment, LayerRouting]:
        selected_ES = routing.token_choice_mask(scored.ranked_SE, self.moe.top_k)
        losses = {}
        if self.training:
            probabilities_SE = scored.logits_SE.softmax(dim=-1)
            losses["balance"] = routing.load_balancing_loss(probabilities_SE, selected_ES)
        pairs = len(scored.tokens_SD) * self.moe.top_k
        assignment = routing.ragged_assignment(selected_ES, scored.gates_SE, pairs)
        return assignment, LayerRouting(selected_ES, losses=losses)
