"""Moves the capacity thresholds once per optimizer step, all layers at once."""

import torch
from torch import Tensor

from diffmoe.models.dit import DiT
from diffmoe.models.moe import LayerRouting
from diffmoe.models.routing import expert_capacity


class ThresholdTracker:
    """Collects the K-th largest predicted probabilities of a step's pools (Eq. 17).

    In the default pool the step's value is the mean over ranks and micro-batches of each pool's
    own; in a wide pool it is the exact one of the pool, the mean over micro-batches. The caller
    takes the mean over ranks, in the collective that it needs anyhow.
    """

    def __init__(self, model: DiT) -> None:
        self.model = model
        self.pool = model.topology.token_pool(model.moe_config.token_pool)
        self._seen_LE: list[Tensor] = []

    @torch.no_grad()
    def observe(self, routing: list[LayerRouting]) -> None:
        """Note one micro-batch's predictions, all layers at once."""
        moe = self.model.moe_config
        if moe.type != "diffmoe":
            return
        logits_LES = torch.stack([layer.capacity_logits_SE.t() for layer in routing])
        L, E, S = logits_LES.shape
        tokens = S * self.pool.ranks
        k = expert_capacity(tokens, moe.experts, moe.capacity, moe.capacity_rounding)
        kth = self.pool.kth_largest(logits_LES.view(L * E, S), k)
        self._seen_LE.append(kth.view(L, E).sigmoid())

    def seen(self) -> Tensor:
        """The mean over this step's micro-batches so far, (L, E); (0,) if there was none."""
        return torch.stack(self._seen_LE).mean(dim=0) if self._seen_LE else torch.empty(0)

    def step(self, kth_LE: Tensor) -> None:
        """Move the thresholds; call after each optimizer step that was taken.

        kth_LE: what was `seen`, the mean over all ranks.
        """
        if self._seen_LE:
            self.model.move_thresholds(kth_LE)
        self.forget()

    def forget(self) -> None:
        """Drop what was observed, as after a skipped step."""
        self._seen_LE.clear()
