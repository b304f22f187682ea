"""The benchmark's comparators and parts compute what they stand for. Nothing asserts time."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from diffmoe.benchmarks.layer import layer_flops, mixture_of, random_tokens
from diffmoe.benchmarks.naive import NaiveMoE
from diffmoe.benchmarks.routing_parts import parts_of, take
from diffmoe.config import Config
from diffmoe.models import routing
from diffmoe.models.families.diffmoe import DiffMoE
from diffmoe.planning.layouts import Layout
from tests.helpers.tiny import tiny_config

CPU = torch.device("cpu")


def output_and_gradients(config: Config, kind: type[DiffMoE]) -> list[Tensor]:
    candidate = mixture_of(config, kind, CPU)
    tokens = random_tokens(config, CPU)
    mixed, capacity_loss = candidate.function(tokens)
    (mixed.square().mean() * 1e4 + capacity_loss).backward()
    return [mixed.detach(), tokens.grad, *(one.grad for one in candidate.module.parameters())]


@pytest.mark.parametrize(
    "changes",
    [{}, {"moe__activation": "swiglu"}, {"moe__shared_expert_ratio": 2.0, "moe__capacity": 2.0}],
)
def test_the_naive_layer_equals_ours_in_output_and_gradients(changes: dict):
    config = tiny_config(**changes)
    ours, naive = (output_and_gradients(config, kind) for kind in (DiffMoE, NaiveMoE))
    for one, other in zip(ours, naive, strict=True):
        assert one.abs().max() > 0
        # fp32: both sum the same products, in another order.
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(one.abs().max()))


def test_the_parts_in_a_chain_are_the_layer():
    config = tiny_config()
    candidate = mixture_of(config, DiffMoE, CPU)
    layer, tokens = candidate.module, random_tokens(config, CPU)
    scores_SE = routing.router_logits(tokens[0], layer.router).softmax(dim=-1)
    selected_ES, (index_EK, gates_EK, *_) = take(layer, scores_SE)
    rows_EKD = layer.experts(routing.gather(tokens[0], index_EK), None)
    mixed_SD = routing.combine(torch.zeros_like(tokens[0]), rows_EKD, gates_EK, index_EK)
    mixed, layer_routing = layer(tokens)
    assert torch.equal(selected_ES, layer_routing.selected_ES)
    assert torch.equal(mixed_SD, mixed[0])


class Flops(TorchDispatchMode):
    """torch's own count; its FlopCounterMode cannot watch torch.autograd.grad."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function._overloadpacket in flop_registry:
            count = flop_registry[function._overloadpacket]
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def counted(work: Callable[[], object]) -> int:
    with Flops() as flops:
        work()
    return flops.total


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_flops_of_the_parts_are_the_planners(activation: str):
    config = tiny_config(moe__activation=activation)
    layout = Layout(config, 1, 1)
    layer = mixture_of(config, DiffMoE, CPU).module
    parts = parts_of(layer, random_tokens(config, CPU).detach()[0].requires_grad_())
    found = {name: counted(work) for name, work in parts.items()}
    (S, D), E, H = (layout.tokens, config.model.width), config.moe.experts, 64
    # Each in the forward, and again for its weight's and its input's gradient; none of the tokens
    # that the predictor sees.
    expected = {
        "router": 3 * 2 * S * D * E,
        "experts": 3 * 2 * layout.rows * D * H * (3 if activation == "swiglu" else 2),
        "predictor": 2 * 2 * S * D * D + 3 * 2 * S * D * E,
    }
    assert {name: flops for name, flops in found.items() if flops} == expected
    assert layer_flops(layout) == sum(expected.values())
