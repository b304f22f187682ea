"""What the experts did in one training step, for the metrics."""

import torch
from torch import Tensor

from diffmoe.models.dit import DiT
from diffmoe.models.moe import LayerRouting


class RoutingMetrics:
    """Collects one step's routing, the mean over micro-batches; the caller averages over ranks."""

    def __init__(self, network: DiT) -> None:
        self.network = network
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0

    @torch.no_grad()
    def observe(self, routing: list[LayerRouting]) -> None:
        if not routing:
            return
        self._micro_batches += 1
        selected_LES = torch.stack([layer.selected_ES for layer in routing])
        # Share of tokens that no expert takes, per layer: only the residual carries them on.
        self._add("unselected_share", (~selected_LES.any(dim=1)).double().mean(dim=1))
        loads_LE = selected_LES
        if routing[0].capacity_logits_SE is not None:
            self._add("capacity_loss", torch.stack([layer.capacity_loss for layer in routing]))
            layers = zip(self.network.moe_layers, routing, strict=True)
            loads_LE = torch.stack(
                [layer.capacity_predictor.wanted(r.capacity_logits_SE).t() for layer, r in layers]
            )
        # C of Eq. 8: what each expert would process at the inference thresholds, 1 at balance.
        self._add("expert_load", loads_LE.double().mean(dim=2) * loads_LE.shape[1])

    def _add(self, name: str, values: Tensor) -> None:
        values = values.double()
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def flat(self) -> Tensor:
        """The means over this rank's micro-batches, (N,), double; nothing without MoE layers."""
        if not self._sums:
            return torch.empty(0, dtype=torch.double)
        flat = torch.cat([values.flatten() for values in self._sums.values()])
        return flat / self._micro_batches

    def summary(self, flat: Tensor) -> dict[str, list]:
        """Nested lists by layer and expert; thresholds beside them.

        flat: of this report, the mean over all ranks.
        """
        if not self._sums:
            return {}
        parts = flat.split([values.numel() for values in self._sums.values()])
        summary = {
            name: part.view_as(values).tolist()
            for (name, values), part in zip(self._sums.items(), parts, strict=True)
        }
        if self.network.moe_config.type == "diffmoe":
            summary["thresholds"] = self.network.thresholds_LE.tolist()
        return summary
