"""Moves the routing's state (thresholds, biases) once per optimizer step, all layers at once."""

import torch
from torch import Tensor

from diffmoe.models.dit import DiT
from diffmoe.models.moe import LayerRouting


class RoutingState:
    """Collects what a step's micro-batches show to the MoE layers' state (`MoEFeedForward.move`).

    In the default pool the step's value is the mean over ranks and micro-batches of each pool's
    own; in a wide pool it is the exact one of the pool, the mean over micro-batches. The caller
    takes the mean over ranks, in the collective that it needs anyhow.
    """

    def __init__(self, network: DiT) -> None:
        self.network = network
        self._seen_LX: list[Tensor] = []

    @torch.no_grad()
    def observe(self, routing: list[LayerRouting]) -> None:
        """Note one micro-batch's routing, all layers at once."""
        layers = self.network.moe_layers
        seen_LX = type(layers[0]).observed(layers, routing) if layers else None
        if seen_LX is not None:
            self._seen_LX.append(seen_LX)

    def seen(self) -> Tensor:
        """The mean over this step's micro-batches so far, (L, X); (0,) without a state."""
        return torch.stack(self._seen_LX).mean(dim=0) if self._seen_LX else torch.empty(0)

    def step(self, seen_LX: Tensor) -> None:
        """Move the state; call after each optimizer step that was taken.

        seen_LX: what was `seen`, the mean over all ranks.
        """
        if self._seen_LX:
            self.network.move_routing_state(seen_LX)
        self.forget()

    def forget(self) -> None:
        """Drop what was observed, as after a skipped step."""
        self._seen_LX.clear()
