"""What the experts did in one training step, for the metrics."""

import math
from typing import Any

import torch
from torch import Tensor

from diffmoe.capacity import health
from diffmoe.models.dit import DiT
from diffmoe.models.moe import LayerRouting


def given(tensor: Tensor | None) -> Tensor:
    """What every layer of a family tells in training."""
    assert tensor is not None
    return tensor


class RoutingMetrics:
    """Collects one step's routing, the mean over micro-batches; the caller averages over ranks."""

    def __init__(self, network: DiT) -> None:
        self.network = network
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0

    @torch.no_grad()
    def observe(self, routing: list[LayerRouting], t_B: Tensor) -> None:
        """t_B: the samples' timesteps."""
        if not routing:
            return
        self._micro_batches += 1
        layers = self.network.moe_layers
        selected_LES = torch.stack([layer.selected_ES for layer in routing])
        # Share of tokens that no expert takes, per layer: only the residual carries them on.
        self._add("unselected_share", (~selected_LES.any(dim=1)).double().mean(dim=1))
        for name in routing[0].losses:
            self._add(f"{name}_loss", torch.stack([layer.losses[name] for layer in routing]))
        loads_LE = selected_LES
        if self.network.has_thresholds:
            pairs = zip(self.network.thresholded_layers, routing, strict=True)
            loads_LE = torch.stack(
                [layer.wanted(given(r.capacity_logits_SE)).t() for layer, r in pairs]
            )
        # C of Eq. 8: what each expert would process at the inference thresholds, 1 at balance.
        self._add("expert_load", loads_LE.double().mean(dim=2) * loads_LE.shape[1])
        # Health, see capacity/health.py.
        self._add("gate_sum", torch.stack([given(layer.gate_sum) for layer in routing]))
        shares = [health.time_share(layer.selected_ES, t_B) for layer in routing]
        self._add("time_share", torch.stack(shares))
        weights = [health.weight_similarity(layer.experts) for layer in layers]
        self._add("expert_weight_similarity", torch.stack(weights))
        outputs = [
            health.output_similarity(layer.experts, given(seen.probe_ND))
            for layer, seen in zip(layers, routing, strict=True)
        ]
        self._add("expert_output_similarity", torch.stack(outputs))

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

        flat: of this report, the mean over all ranks. What a rank's share cannot tell is left out.
        """
        if not self._sums:
            return {}
        parts = flat.cpu().split([values.numel() for values in self._sums.values()])
        found: dict[str, Any] = {
            name: part.view_as(values)
            for (name, values), part in zip(self._sums.items(), parts, strict=True)
        }
        found["load_entropy"] = health.load_entropy(found["expert_load"])
        found["dead_experts"] = health.dead_experts(found["expert_load"])
        summary = {name: values.tolist() for name, values in found.items()}
        summary = {
            name: values
            for name, values in summary.items()
            if not (isinstance(values[0], float) and math.isnan(values[0]))
        }
        if self.network.has_thresholds:
            summary["thresholds"] = self.network.thresholds_LE.tolist()
        return summary
