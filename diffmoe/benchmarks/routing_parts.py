"""The parts of one MoE layer, each alone, on the same tokens; a test chains them into the layer."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffmoe.benchmarks.timing import forward_backward
from diffmoe.models import routing
from diffmoe.models.capacity_predictor import capacity_loss
from diffmoe.models.families.diffmoe import DiffMoE
from diffmoe.models.routing import Assignment


def take(layer: DiffMoE, scores_SE: Tensor) -> tuple[Tensor, Assignment]:
    """Which tokens every expert takes, as mask (E, S) and as static assignment."""
    k = layer._capacity(len(scores_SE), layer.moe.capacity)
    selected_ES = layer._select_from_pool(routing.ranked(scores_SE), k)
    return selected_ES, routing.static_assignment(selected_ES, scores_SE, k)


def parts_of(layer: DiffMoE, tokens_SD: Tensor) -> dict[str, Callable[[], object]]:
    """Forward and backward of each part of a DiffMoE layer in training, by name.

    tokens_SD must need a gradient.
    """

    def scores(tokens: Tensor, weight: Tensor) -> Tensor:
        return routing.router_scores(routing.router_logits(tokens, weight), layer.moe.gate)

    scores_SE = scores(tokens_SD, layer.router).detach()
    selected_ES, (index_EK, gates_EK, *_) = take(layer, scores_SE)
    rows_EKD = routing.gather(tokens_SD, index_EK).detach().requires_grad_()
    gates_EK = gates_EK.detach().requires_grad_()
    predictor = layer.capacity_predictor
    logits_ES = predictor(tokens_SD).detach().t().contiguous()
    k = index_EK.shape[1]
    return {
        "router": forward_backward(scores, tokens_SD, layer.router),
        "top-k": lambda: take(layer, scores_SE),
        "gather": forward_backward(lambda tokens: routing.gather(tokens, index_EK), tokens_SD),
        "experts": forward_backward(
            lambda rows, *_: layer.experts(rows, None), rows_EKD, *layer.experts.parameters()
        ),
        "combine": forward_backward(
            lambda rows, gates: routing.combine(torch.zeros_like(tokens_SD), rows, gates, index_EK),
            rows_EKD,
            gates_EK,
        ),
        "predictor": forward_backward(
            lambda *_: capacity_loss(predictor(tokens_SD), selected_ES), *predictor.parameters()
        ),
        "thresholds": lambda: layer.pool.kth_largest(logits_ES, k),
    }


ROUTING = ("router", "top-k", "gather", "combine", "predictor", "thresholds")


def seeded_layer(layer: DiffMoE, device: torch.device, dtype: torch.dtype) -> DiffMoE:
    """Fill a fresh layer with small noise, so that experts choose different tokens."""
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return layer.to(device, dtype).train()
