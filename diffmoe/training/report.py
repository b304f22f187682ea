"""What the experts did in one training step, for the metrics."""

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe.models.dit import DiT
from diffmoe.models.moe import LayerRouting


class RoutingReport:
    """Collects one step's routing; `summary` averages over micro-batches and ranks."""

    def __init__(self, network: DiT) -> None:
        self.network = network
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0

    @torch.no_grad()
    def observe(self, routing: list[LayerRouting]) -> None:
        if not routing:
            return
        self._micro_batches += 1
        taken_LES = torch.stack([layer.taken_ES for layer in routing])
        # Share of tokens that no expert takes, per layer: only the residual carries them on.
        self._add("untaken_share", (~taken_LES.any(dim=1)).double().mean(dim=1))
        loads_LE = taken_LES
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

    @torch.no_grad()
    def summary(self) -> dict[str, list]:
        """Nested lists by layer and expert; thresholds beside them. One collective."""
        if not self._sums:
            return {}
        flat = torch.cat([values.flatten() for values in self._sums.values()])
        dist.all_reduce(flat)
        flat /= dist.get_world_size() * self._micro_batches
        parts = flat.split([values.numel() for values in self._sums.values()])
        summary = {
            name: part.view_as(values).tolist()
            for (name, values), part in zip(self._sums.items(), parts, strict=True)
        }
        if self.network.moe_config.type == "diffmoe":
            summary["thresholds"] = self.network.thresholds_LE.tolist()
        return summary
