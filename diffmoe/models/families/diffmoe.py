"""DiffMoE (arXiv 2503.14487, section 3): experts take the best tokens of the pool."""

from collections.abc import Sequence

import torch
from torch import Tensor

from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.models import routing
from diffmoe.models.capacity_predictor import CapacityPredictor, capacity_loss
from diffmoe.models.moe import LayerRouting, MoEFeedForward, Scored
from diffmoe.models.routing import Assignment
from diffmoe.models.thresholded import ThresholdedMoE
from diffmoe.parallel.topology import Topology


class DiffMoE(ThresholdedMoE):
    """Every expert takes its K best tokens of the pool; a predictor learns which (Eq. 6, 10-14)."""

    routing_parts = (*ThresholdedMoE.routing_parts, "capacity_predictor")
    capacity_predictor: CapacityPredictor

    def __init__(self, model: ModelConfig, moe: MoEConfig, topology: Topology) -> None:
        super().__init__(model, moe, topology)
        self.capacity_predictor = CapacityPredictor(model.width, moe.experts)

    @property
    def tracked(self) -> Tensor:
        return self.capacity_predictor.thresholds

    def wanted(self, logits_SE: Tensor) -> Tensor:
        """Eq. 14: a probability above the threshold."""
        if self.calibrated_E is not None:
            return logits_SE > self.calibrated_E
        return logits_SE.sigmoid() > self.tracked

    @classmethod
    def observed(
        cls, layers: Sequence[MoEFeedForward], records: Sequence[LayerRouting]
    ) -> Tensor | None:
        """The K-th largest predicted probability of each expert's pool, all layers at once."""
        logits = [layer.capacity_logits_SE for layer in records]
        logits_LES = torch.stack([one.t() for one in logits if one is not None])
        L, E, S = logits_LES.shape
        pool = layers[0].pool
        k = layers[0]._capacity(S * pool.ranks, layers[0].moe.capacity)
        return pool.kth_largest(logits_LES.view(L * E, S), k).view(L, E).sigmoid()

    def move(self, seen_X: Tensor) -> None:
        """One step of the moving average of Eq. 17."""
        self.tracked.lerp_(seen_X, 1 - self.moe.threshold_ema)

    def _select(self, scored: Scored) -> tuple[Assignment, LayerRouting]:
        tokens = scored.tokens_SD.shape[0]  # not len(), which torch.export takes for a constant
        logits_SE = self.capacity_predictor(scored.tokens_SD)
        if self.training:
            k = self._capacity(tokens * self.pool.ranks, self.moe.capacity)
            selected_ES = self._select_from_pool(scored.ranked_SE, k)
            losses = {"capacity": capacity_loss(logits_SE, selected_ES)}
            assignment = self._assign(selected_ES, scored.gates_SE, k)
            return assignment, LayerRouting(selected_ES, logits_SE, losses)
        if self.inference == "static":
            k = self._capacity(tokens, self.capacity)
            selected_ES = routing.top_k_mask(scored.ranked_SE.t(), k)
            assignment = self._assign(selected_ES, scored.gates_SE, k)
            return assignment, LayerRouting(selected_ES, logits_SE)
        return self._by_threshold(scored, logits_SE)

    def _select_from_pool(self, scores_SE: Tensor, k: int) -> Tensor:
        scores_ES = scores_SE.t().contiguous()
        kth_E = self.pool.kth_largest(scores_ES, k)
        return routing.select_largest(scores_ES, kth_E, self.pool.ties(scores_ES, kth_E, k))
