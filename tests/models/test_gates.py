"""What the router sees (moe.router_input), and what its logits become (moe.gate, gate_scale)."""

import pytest
import torch
from torch import Tensor

from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.models import routing
from diffmoe.models.dit import DiT
from diffmoe.models.moe import MoEFeedForward
from tests.helpers.tiny import randomize, tiny_config

WIDTH, EXPERTS = 16, 4
GATES = {
    "softmax": lambda logits: logits.softmax(dim=-1),
    "sigmoid": lambda logits: 1 / (1 + (-logits).exp()),
    "identity": lambda logits: logits,
}
FAMILIES = ["diffmoe", "expert_choice", "token_choice"]


def layer_of(**changes) -> MoEFeedForward:
    config = tiny_config(**changes)
    return randomize(DiT(config.model, config.moe), scale=0.5).moe_layers[0].double()


def tokens(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 10, WIDTH, generator=generator, dtype=torch.float64)


def expert_output(layer: MoEFeedForward, expert: int, flat: Tensor) -> Tensor:
    counts = torch.zeros(EXPERTS, dtype=torch.long)
    counts[expert] = len(flat)
    return layer.experts(flat, counts)


@pytest.mark.parametrize("scale", [1.0, 2.5, "experts"])
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [True, False])
def test_output_and_gradients_equal_the_formula(
    family: str, gate: str, scale: float | str, training: bool
):
    layer = layer_of(moe__type=family, moe__gate=gate, moe__gate_scale=scale).train(training)
    if family == "diffmoe":
        layer.tracked.fill_(0.5)
    x = tokens().requires_grad_()
    y, routed = layer(x)
    weights = [x, layer.router, *layer.experts.parameters()]
    found = torch.autograd.grad(y.sin().sum(), weights)

    flat = x.flatten(0, 1)
    factor = EXPERTS if scale == "experts" else scale
    gates_SE = GATES[gate](flat @ layer.router.t()) * factor
    expected = sum(
        expert_output(layer, i, flat) * (gates_SE[:, i] * selected_S)[:, None]
        for i, selected_S in enumerate(routed.selected_ES)
    )
    torch.testing.assert_close(y.flatten(0, 1), expected, atol=1e-12, rtol=0)  # float64 rounding
    wanted = torch.autograd.grad(expected.sin().sum(), weights)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("gate", GATES)
def test_experts_take_the_tokens_of_the_largest_scores(gate: str):
    """Of logits, of which sigmoid keeps the order in each expert and softmax does not."""
    layer = layer_of(moe__gate=gate).train()
    flat = tokens().flatten(0, 1)
    selected_ES = layer(tokens())[1].selected_ES
    scores_ES = GATES[gate](flat @ layer.router.t()).t()
    k = routing.expert_capacity(len(flat), EXPERTS, 1.0)
    for scores_S, selected_S in zip(scores_ES, selected_ES, strict=True):
        assert set(selected_S.nonzero().flatten().tolist()) == set(
            scores_S.topk(k).indices.tolist()
        )
    assert (scores_ES < 0).any() == (gate == "identity")


def test_an_identity_gate_has_no_jacobian_of_a_softmax():
    """d(sum of outputs) / d(logit of s, e) is the sum of e's output for s if e took s, else 0."""
    layer = layer_of(moe__gate="identity").train()
    x, logits = tokens(), []
    layer._logits = lambda flat: (
        logits.append(routing.router_logits(flat, layer.router).detach().requires_grad_())
        or logits[0]
    )
    y, routed = layer(x)
    (gradient_SE,) = torch.autograd.grad(y.sum(), logits)
    for i, selected_S in enumerate(routed.selected_ES):
        expected_S = expert_output(layer, i, x.flatten(0, 1)).sum(dim=1) * selected_S
        torch.testing.assert_close(gradient_SE[:, i], expected_S, atol=1e-12, rtol=0)


def selections(config: Config, network: DiT, label: int, t: float) -> Tensor:
    """What the first MoE layer's experts select of one sample, at its own scores."""
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    out = network(x, torch.tensor([t]), torch.tensor([label]))
    return out.routing[0].selected_ES


@pytest.mark.parametrize("seen", ["modulated", "plain", "plain_with_time"])
def test_the_router_sees_what_was_chosen(seen: str):
    """Behind a first block that adds nothing, only the modulation carries label and timestep."""
    config = tiny_config(moe__router_input=seen, moe__gate="identity", moe__capacity=1.0)
    network = randomize(DiT(config.model, config.moe), scale=0.5).train()
    with torch.no_grad():  # gates of 0: tokens reach block 1 as the patches gave them
        network.blocks[0].adaln.weight.zero_()
        network.blocks[0].adaln.bias.zero_()
        attention = network.blocks[1].adaln
        attention.weight[: 3 * WIDTH].zero_()
        attention.bias[: 3 * WIDTH].zero_()
    base = selections(config, network, label=0, t=0.3)
    by_label = [selections(config, network, label=k, t=0.3) for k in range(1, 5)]
    by_time = [selections(config, network, label=0, t=t) for t in (0.0, 0.5, 0.9)]
    assert any(not torch.equal(base, other) for other in by_label) == (seen == "modulated")
    # A term that all tokens share moves no expert's order of them: the pool is one sample's.
    assert any(not torch.equal(base, other) for other in by_time) == (seen == "modulated")


def test_a_term_of_time_moves_logits_alike_for_all_tokens_of_a_sample():
    layer = layer_of(moe__router_input="plain_with_time", moe__gate="identity")
    plain, time_BD = tokens(1), torch.randn(3, WIDTH, dtype=torch.float64)
    layer.capacity_predictor.thresholds.fill_(-1.0)  # so that every expert takes every token
    assignment, _ = layer.eval()._route(tokens().flatten(0, 1), 10, plain, time_BD)
    logits_SE = assignment.gates.view(EXPERTS, 30).t()
    both = torch.cat([plain, time_BD[:, None].expand_as(plain)], dim=-1).flatten(0, 1)
    expected_SE = both @ torch.cat([layer.router, layer.router_time], dim=1).t()
    torch.testing.assert_close(logits_SE, expected_SE, atol=1e-12, rtol=0)


def test_a_nan_is_below_every_logit():
    scores = torch.tensor([[float("nan"), -5.0], [-7.0, float("nan")], [-6.0, -4.0]])
    mask = routing.top_k_mask(routing.ranked(scores).t(), 2)
    assert mask.tolist() == [[False, True, True], [True, False, True]]


@pytest.mark.parametrize("value", [0.0, -1.0, "all"])
def test_scales_that_make_no_sense_are_refused(value: float | str):
    with pytest.raises((UserError, ValueError), match="gate_scale"):
        tiny_config(moe__gate_scale=value)
