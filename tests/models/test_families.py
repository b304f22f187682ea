"""The newer families against plain loops in float64, and what holds for all of them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffmoe.config import Config, MoEConfig
from diffmoe.errors import UserError
from diffmoe.models.moe import LayerRouting, MoEFeedForward, routing_loss
from diffmoe.models.routing_mode import RoutingMode
from tests.helpers.families import EXPERTS, hidden, layer_of, network_of, tokens
from tests.helpers.networks import one_after_the_other
from tests.helpers.tiny import tiny_config

NULL_B = torch.tensor([False, True, False])


def cosines(layer: MoEFeedForward, flat: Tensor) -> Tensor:
    norms = flat.norm(dim=1, keepdim=True) * layer.router.norm(dim=1)
    return flat @ layer.router.t() / norms


def one_for_one(layer: Any, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By loops over tokens and experts: which pairs are taken, gates, and what is added to all."""
    moe, base = layer.moe, layer.shared_expert(flat)
    taken_SE = torch.zeros(len(flat), EXPERTS, dtype=torch.bool)
    if moe.type == "race":
        gates_SE = hidden(layer, flat) @ layer.router.t()
        pairs = [(-gates_SE[s, e].item(), s, e) for s in range(len(flat)) for e in range(EXPERTS)]
        if layer.training:
            winners = sorted(pairs)[: math.floor(len(flat) * moe.capacity)]
        else:
            winners = [pair for pair in pairs if -pair[0] >= float(layer.thresholds)]
        for _, s, e in winners:
            taken_SE[s, e] = True
        return taken_SE, gates_SE * moe.gate_factor, base
    if moe.type == "promoe":
        gates_SE, rows = cosines(layer, flat), []
        for s, row in enumerate(gates_SE):
            if NULL_B[s // 10]:
                rows.append(layer.unconditional_expert(flat[s]))
                continue
            rows.append(torch.zeros_like(flat[s]))
            for e in sorted(range(EXPERTS), key=lambda e, row=row: -float(row[e]))[: moe.top_k]:
                taken_SE[s, e] = True
        return taken_SE, gates_SE * moe.gate_factor, base + torch.stack(rows)
    scores_SE = (flat @ layer.router.t()).sigmoid()
    gates = []
    for s, row in enumerate(scores_SE):
        biased = (row + layer.selection_bias).tolist()
        chosen = sorted(range(EXPERTS), key=lambda e, biased=biased: -biased[e])[: moe.top_k]
        taken_SE[s, chosen] = True
        total = sum(row[e] for e in chosen) if moe.top_k > 1 else 1.0
        gates.append(row / total * moe.gate_factor)
    return taken_SE, torch.stack(gates), base


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("race", {"moe__capacity": 1.3}),
        ("promoe", {"moe__top_k": 1}),
        ("promoe", {"moe__top_k": 2, "moe__activation": "swiglu"}),
        ("dsmoe", {"moe__top_k": 1}),
        ("dsmoe", {"moe__top_k": 3}),
    ],
)
def test_output_and_gradients_equal_a_plain_loop(
    family: str, changes: dict, scale: float, training: bool
):
    changes = {"moe__gate_scale": scale, "moe__shared_expert_ratio": 2.0, **changes}
    layer = layer_of(family, **changes).train(training)
    if family == "dsmoe":
        layer.selection_bias.copy_(torch.tensor([0.1, -0.2, 0.05, 0.0]))
    if family == "race":
        layer.thresholds.fill_(0.3)
    x = tokens().requires_grad_()
    weights = [x, *layer.parameters()]
    y, routed = layer(x, None, None, NULL_B)
    found = torch.autograd.grad(y.sin().sum(), weights, allow_unused=True)

    flat = x.flatten(0, 1)
    taken_SE, gates_SE, expected = one_for_one(layer, flat)
    assert torch.equal(routed.selected_ES.t(), taken_SE)
    for e in range(EXPERTS):
        counts = [len(flat) if e == i else 0 for i in range(EXPERTS)]
        rows = one_after_the_other(layer.experts, flat, counts)
        expected = expected + rows * (gates_SE[:, e] * taken_SE[:, e])[:, None]
    torch.testing.assert_close(y.flatten(0, 1), expected, atol=1e-12, rtol=0)  # float64 rounding
    wanted = torch.autograd.grad(expected.sin().sum(), weights, allow_unused=True)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


def test_weights_of_losses_are_the_configuration():
    changes = {"moe__similarity_loss_weight": 0.5, "moe__z_loss_weight": 2.0}
    layer = layer_of("race", **changes).train()
    routed = layer(tokens())[1]
    logits_SE = hidden(layer, tokens().flatten(0, 1)) @ layer.router.t()
    z = logits_SE.exp().sum(dim=1).log().square().mean()
    torch.testing.assert_close(routed.losses["z"], z, atol=1e-12, rtol=0)
    total = 2 * (0.5 * routed.losses["similarity"] + 2.0 * routed.losses["z"])
    torch.testing.assert_close(routing_loss([routed, routed], layer.moe), total)
    assert "z" not in layer.eval()(tokens())[1].losses


def test_a_family_brings_the_gate_of_its_paper():
    gates = {family: MoEConfig(type=family).gate for family in ("diffmoe", "race", "dsmoe")}
    assert gates == {"diffmoe": "softmax", "race": "identity", "dsmoe": "sigmoid"}
    assert MoEConfig(type="race", gate="softmax").gate == "softmax"
    assert tiny_config(moe__type="promoe").moe.gate == "identity"


def test_scores_that_may_sum_to_zero_are_not_divided_by_their_sum():
    with pytest.raises((UserError, ValueError), match="divides a token's scores by their sum"):
        MoEConfig(type="dsmoe", gate="identity", top_k=2)
    assert MoEConfig(type="dsmoe", gate="identity").top_k == 1


@pytest.mark.parametrize("family", ["promoe", "dsmoe"])
def test_what_has_no_thresholds_has_no_dial(family: str):
    with pytest.raises(UserError, match=f"a {family} model has only one way to route"):
        network_of(family).routing = RoutingMode("static", 1.0)


@pytest.mark.parametrize("family", ["promoe", "dsmoe", "expert_choice"])
def test_pools_over_ranks_belong_to_those_who_have_one(family: str):
    with pytest.raises((UserError, ValueError), match="token_pool=global"):
        Config.model_validate({"moe": {"type": family, "token_pool": "global"}})


def test_records_default_to_no_losses():
    assert LayerRouting(torch.ones(1, 1)).losses == {}
    assert routing_loss([LayerRouting(torch.ones(1, 1))], MoEConfig()) == 0.0
