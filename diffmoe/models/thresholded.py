"""What families share whose thresholds replace the token pool at inference."""

from torch import Tensor

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.models import routing
from diffmoe.models.moe import LayerRouting, MoEFeedForward, Scored
from diffmoe.models.routing import Assignment
from diffmoe.parallel.topology import Topology


class ThresholdedMoE(MoEFeedForward):
    """In training the best of the pool are selected; in evaluation `inference` decides:

    per_token (an image does not depend on its batch mates), pooled or static; see RoutingMode.
    calibrated_E: calibrated thresholds (E,), as logits, which inference uses instead of those that
    training tracked where they are set. Near 0 and 1 many probabilities round to the same number;
    their logits do not.
    """

    calibrated_E: Tensor | None

    def __init__(self, model: ModelConfig, moe: MoEConfig, topology: Topology) -> None:
        super().__init__(model, moe, topology)
        self.inference, self.capacity = moe.inference, moe.capacity
        self.register_buffer("calibrated_E", None, persistent=False)

    @property
    def tracked(self) -> Tensor:
        """The thresholds that training tracked, one or one per expert."""
        raise NotImplementedError

    def wanted(self, logits_SE: Tensor) -> Tensor:
        """Mask (S, E) of the per-token test. logits_SE: LayerRouting.capacity_logits_SE."""
        raise NotImplementedError

    def _by_threshold(self, scored: Scored, logits_SE: Tensor) -> tuple[Assignment, LayerRouting]:
        """Per-token routing, or pooled: as many tokens, but those with the best scores (Alg. 4)."""
        wanted_SE = self.wanted(logits_SE)
        if self.inference == "pooled":
            selected_ES = routing.counted_mask(scored.ranked_SE, wanted_SE.sum(dim=0))
        else:
            selected_ES = wanted_SE.t()
        assignment = routing.ragged_assignment(selected_ES, scored.gates_SE)
        return assignment, LayerRouting(selected_ES, logits_SE)
