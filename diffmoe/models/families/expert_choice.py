"""Expert choice (EC-DiT): every expert takes its best tokens of each sample."""

from diffmoe.models import routing
from diffmoe.models.moe import LayerRouting, MoEFeedForward, Scored
from diffmoe.models.routing import Assignment


class ExpertChoice(MoEFeedForward):
    """K tokens of each sample for every expert, in training and inference alike."""

    def _select(self, scored: Scored) -> tuple[Assignment, LayerRouting]:
        tokens_per_sample = scored.tokens_per_sample
        k = self._capacity(tokens_per_sample, self.moe.capacity)
        selected_ES = routing.expert_choice_mask(scored.ranked_SE, tokens_per_sample, k)
        k *= scored.tokens_SD.shape[0] // tokens_per_sample
        return self._assign(selected_ES, scored.gates_SE, k), LayerRouting(selected_ES)
