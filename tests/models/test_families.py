"""Expert race, ProMoE and DSMoE: closed forms, and gradients against a plain loop in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.config import Config, MoEConfig
from diffmoe.errors import UserError
from diffmoe.models import routing
from diffmoe.models.dit import DiT
from diffmoe.models.families.promoe import contrastive_loss
from diffmoe.models.families.race import router_similarity
from diffmoe.models.moe import LayerRouting, MoEFeedForward, routing_loss
from diffmoe.models.routing_mode import RoutingMode
from diffmoe.parallel.pool import TokenPool
from tests.helpers.networks import WIDTH, examples, one_after_the_other
from tests.helpers.tiny import randomize, tiny_config

EXPERTS = 4
NULL_B = torch.tensor([False, True, False])
LABELS = torch.tensor([0, 5, 3])  # of which 5 is the null label


def network_of(family: str, scale: float = 0.5, **changes) -> DiT:
    config = tiny_config(moe__type=family, **changes)
    return randomize(DiT(config.model, config.moe), scale=scale)


def layer_of(family: str, **changes) -> Any:
    return network_of(family, **changes).moe_layers[0].double()


def tokens(samples: int = 3, per_sample: int = 10, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, per_sample, WIDTH, generator=generator, dtype=torch.float64)


def cosines(layer: MoEFeedForward, flat: Tensor) -> Tensor:
    norms = flat.norm(dim=1, keepdim=True) * layer.router.norm(dim=1)
    return flat @ layer.router.t() / norms


def hidden(layer: Any, flat: Tensor) -> Tensor:
    linear = layer.router_hidden
    return F.gelu(flat @ linear.weight.t() + linear.bias, approximate="tanh")


def one_for_one(layer: Any, flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By loops over tokens and experts: which pairs are taken, gates, and what is added to all."""
    moe, base = layer.moe, layer.shared_expert(flat)
    taken_SE = torch.zeros(len(flat), EXPERTS, dtype=torch.bool)
    if moe.type == "race":
        gates_SE = hidden(layer, flat) @ layer.router.t()
        pairs = [(-float(gates_SE[s, e]), s, e) for s in range(len(flat)) for e in range(EXPERTS)]
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


# Expert race.


@pytest.mark.parametrize("capacity", [0.3, 1.0, 2.7, 4.0])
@pytest.mark.parametrize("levels", [2, 7, 0])
def test_a_race_has_as_many_winners_as_it_says_whatever_ties(capacity: float, levels: int):
    layer = layer_of("race", moe__capacity=capacity).train()
    if levels:  # few distinct logits
        layer._logits = lambda h: (
            (F.linear(h, layer.router) * levels).round().clamp(-levels, levels) / levels
        )
    selected_ES = layer(tokens())[1].selected_ES
    assert selected_ES.sum() == math.floor(30 * capacity)


def test_of_equal_scores_the_first_tokens_win_and_of_those_the_first_experts():
    layer = layer_of("race", moe__capacity=0.5).train()
    layer._logits = lambda h: torch.zeros(len(h), EXPERTS, dtype=h.dtype)
    selected_SE = layer(tokens(1, 10))[1].selected_ES.t()
    assert selected_SE.flatten().nonzero().flatten().tolist() == list(range(5))


def test_a_race_of_one_expert_is_expert_choice_over_the_pool():
    layer = layer_of("race", moe__experts=1, moe__capacity=0.4).train()
    x = tokens()
    scores_S = (hidden(layer, x.flatten(0, 1)) @ layer.router.t())[:, 0]
    expected = set(scores_S.topk(12).indices.tolist())
    assert set(layer(x)[1].selected_ES[0].nonzero().flatten().tolist()) == expected


def test_a_race_of_one_token_is_token_choice():
    layer = layer_of("race", moe__capacity=2.0).train()
    x = tokens(1, 1)
    scores_SE = hidden(layer, x.flatten(0, 1)) @ layer.router.t()
    expected = routing.token_choice_mask(scores_SE, 2)
    assert torch.equal(layer(x)[1].selected_ES, expected)


def test_the_threshold_follows_the_smallest_winner():
    layer, c, m = layer_of("race", moe__threshold_ema=0.9), 3.0, 0.9
    layer.thresholds.fill_(-1.0)
    for _ in range(5):
        layer.move(torch.tensor([c]))
    expected = m**5 * -1.0 + (1 - m**5) * c
    assert layer.thresholds.item() == pytest.approx(expected, abs=1e-12)
    _, routed = layer.train()(tokens())
    scores = hidden(layer, tokens().flatten(0, 1)) @ layer.router.t()
    smallest = scores.flatten().topk(30).values[-1].item()
    assert routed.seen_X.item() == pytest.approx(smallest, abs=1e-12)
    layer.thresholds.copy_(routed.seen_X)
    _, at_inference = layer.eval()(tokens())
    assert torch.equal(at_inference.selected_ES, routed.selected_ES)


@torch.no_grad()
def test_a_racing_sample_does_not_depend_on_its_mates_at_inference():
    network = network_of("race", scale=0.15).eval()
    x, t, labels = examples(4)
    whole = network(x, t, labels)
    alone = network(x[:1], t[:1], labels[:1])
    torch.testing.assert_close(whole.prediction[:1], alone.prediction, atol=1e-5, rtol=0)
    for ours, theirs in zip(whole.routing, alone.routing, strict=True):
        assert torch.equal(ours.selected_ES[:, :16], theirs.selected_ES)


@pytest.mark.parametrize("capacity", [0.5, 1.0, 2.0])
def test_static_routing_of_a_race_meets_its_capacity(capacity: float):
    network = network_of("race").eval()
    with torch.no_grad(), network.routed(RoutingMode("static", capacity)):
        for layer in network(*examples(4)).routing:
            assert layer.selected_ES.sum() == 64 * capacity


def test_calibrated_thresholds_take_the_place_of_the_tracked_one():
    network = network_of("race").eval()
    calibrated_LE = torch.tensor([[1e9, -1e9, 1e9, -1e9]] * 2)
    with torch.no_grad(), network.routed(RoutingMode(calibrated_LE=calibrated_LE)):
        for layer in network(*examples(2)).routing:
            assert layer.selected_ES.sum(dim=1).tolist() == [0, 32, 0, 32]


def similarity(probabilities_SE: Tensor, taken_SE: Tensor) -> float:
    logits = probabilities_SE.double().clamp(min=1e-300).log()
    return router_similarity(logits, taken_SE.bool().t(), TokenPool()).item()


def pairs_taken(pairs: list[tuple[int, int]]) -> Tensor:
    taken_SE = torch.zeros(len(pairs), EXPERTS)
    for s, pair in enumerate(pairs):
        taken_SE[s, list(pair)] = 1
    return taken_SE


def test_router_similarity_has_its_closed_forms():
    uniform = torch.full((12, EXPERTS), 1 / EXPERTS)
    top_1 = F.one_hot(torch.arange(12) % EXPERTS, EXPERTS)
    assert similarity(uniform, top_1) == pytest.approx(1 / EXPERTS)
    assert similarity(uniform, pairs_taken([(0, 1), (2, 3)] * 6)) == pytest.approx(1)
    for counts in ([3, 3, 3, 3], [12, 0, 0, 0], [6, 4, 1, 1]):
        one_hot = F.one_hot(torch.repeat_interleave(torch.arange(4), torch.tensor(counts)), 4)
        expected = EXPERTS * sum((n / 12) ** 2 for n in counts)
        assert similarity(one_hot, one_hot) == pytest.approx(expected)
    every = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    for pairs, expected in (([(0, 1)] * 12, 4), ([(0, 1), (2, 3)] * 6, 2), (every * 2, 1)):
        taken = pairs_taken(pairs)
        assert similarity(taken / 2, taken) == pytest.approx(expected)


def test_router_similarity_has_its_gradient():
    """2 / S * P W of the probabilities, W held constant."""
    generator = torch.Generator().manual_seed(0)
    logits_SE = torch.randn(9, EXPERTS, generator=generator, dtype=torch.float64).requires_grad_()
    selected_ES = torch.rand(EXPERTS, 9, generator=generator) > 0.4
    (found,) = torch.autograd.grad(
        router_similarity(logits_SE, selected_ES, TokenPool()), logits_SE
    )
    taken = selected_ES.double()
    together = taken @ taken.t()
    off = together - together.diag().diag()
    weights = (together.diag() * EXPERTS / together.diag().sum()).diag()
    weights = weights + off * (EXPERTS**2 - EXPERTS) / off.sum()
    probabilities = logits_SE.softmax(dim=1)
    expected = torch.autograd.grad(
        probabilities, logits_SE, (2 / 9 * probabilities @ weights).detach()
    )
    torch.testing.assert_close(found, expected[0], atol=1e-15, rtol=1e-12)


def test_the_target_head_learns_from_its_own_loss_alone():
    config = tiny_config(moe__type="race", moe__target_loss_weight=0.01)
    network = randomize(DiT(config.model, config.moe)).train()
    x, t, labels = examples(2)
    output = network(x, t, labels)
    layer, routed = network.moe_layers[0], output.routing[0]
    assert routed.target_prediction.shape == x.shape

    def gradients(loss: Tensor) -> list[Tensor | None]:
        wanted = [layer.target_head.weight, layer.router, layer.router_hidden.weight]
        return list(torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True))

    main = gradients(output.prediction.square().mean())
    assert main[0] is None
    assert main[2].count_nonzero() > 0
    own = gradients(routed.target_prediction.square().mean())
    assert own[1] is None
    assert own[0].count_nonzero() > 0
    assert own[2].count_nonzero() > 0


# ProMoE.


def routed_alone(layer: MoEFeedForward, x: Tensor, null: bool) -> Tensor:
    return layer(x, None, None, torch.full((len(x),), null))[0]


def test_tokens_without_a_condition_see_an_expert_of_their_own():
    layer = layer_of("promoe", moe__shared_expert_ratio=1.0)
    x = tokens()
    mixed = layer(x, None, None, NULL_B)[0]
    for part, null in ((0, False), (1, True), (2, False)):
        alone = routed_alone(layer, x[part : part + 1], null)
        torch.testing.assert_close(mixed[part : part + 1], alone, atol=1e-13, rtol=0)
    flat = x.flatten(0, 1)
    expected = layer.unconditional_expert(flat) + layer.shared_expert(flat)
    torch.testing.assert_close(
        routed_alone(layer, x, True).flatten(0, 1), expected, atol=1e-13, rtol=0
    )


@pytest.mark.parametrize("null", [True, False])
def test_gradients_of_what_no_token_sees_are_zero(null: bool):
    layer = layer_of("promoe").train()
    y, routed = layer(tokens(), None, None, torch.full((3,), null))
    (y.sin().sum() + sum(routed.losses.values())).backward()
    unconditional = [p.grad for p in layer.unconditional_expert.parameters()]
    experts = [layer.router.grad, *(p.grad for p in layer.experts.parameters())]
    unseen, seen = (experts, unconditional) if null else (unconditional, experts)
    assert all(gradient is None or (gradient == 0).all() for gradient in unseen)
    assert all(gradient.count_nonzero() > 0 for gradient in seen)
    assert all(gradient.isfinite().all() for gradient in [*seen, *unseen] if gradient is not None)


def test_a_token_along_a_prototype_has_a_gate_of_one():
    layer = layer_of("promoe")
    along = 3.7 * layer.router.detach()[2]
    y, _ = layer(along.view(1, 1, WIDTH))
    expected = one_after_the_other(layer.experts, along[None], [0, 0, 1, 0])
    torch.testing.assert_close(y[0], expected, atol=1e-12, rtol=0)
    alone = layer_of("promoe", moe__experts=1)
    opposite = -2.0 * alone.router.detach()
    expected = -one_after_the_other(alone.experts, opposite, [1])
    torch.testing.assert_close(alone(opposite[None])[0][0], expected, atol=1e-12, rtol=0)


def test_the_network_tells_which_samples_have_no_condition():
    network = network_of("promoe").eval()
    x, t, _ = examples(3)
    with torch.no_grad():
        routed = network(x, t, LABELS).routing[0]
    per_sample = routed.selected_ES.sum(dim=0).view(3, 16)
    assert per_sample.sum(dim=1).tolist() == [16, 0, 16]


@pytest.mark.parametrize("temperature", [0.07, 0.1])
def test_the_contrastive_loss_has_its_closed_forms(temperature: float):
    E = 12
    prototypes = torch.eye(E, WIDTH, dtype=torch.float64)
    every = torch.eye(E, dtype=torch.bool)
    expected = math.log(1 + (E - 1) * math.exp(-1 / temperature))
    found = contrastive_loss(prototypes * 5, prototypes * 0.1, every, temperature).item()
    assert found == pytest.approx(expected, rel=1e-6)
    same = torch.ones(E, WIDTH, dtype=torch.float64)
    for active in (2, 7, 12):
        selected_ES = every & (torch.arange(E) < active)[:, None]
        found = contrastive_loss(same, prototypes, selected_ES, temperature).item()
        assert found == pytest.approx(math.log(active))
    for active in (0, 1):
        selected_ES = every & (torch.arange(E) < active)[:, None]
        assert contrastive_loss(prototypes, same, selected_ES, temperature).item() == 0


def test_the_contrastive_loss_has_its_gradient_and_leaves_idle_prototypes_alone():
    """Of z = cosine / temperature: (softmax of the row - one-hot) / number of active experts."""
    tau, generator = 0.2, torch.Generator().manual_seed(0)
    flat = torch.randn(9, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    prototypes = torch.randn(4, WIDTH, generator=generator, dtype=torch.float64).requires_grad_()
    owner_S = torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3])
    selected_ES = F.one_hot(owner_S, 4).t().bool()
    found = torch.autograd.grad(
        contrastive_loss(flat, prototypes, selected_ES, tau), [flat, prototypes]
    )
    active = [0, 1, 3]
    means = torch.stack([flat[owner_S == i].mean(dim=0) for i in active])
    z = F.cosine_similarity(prototypes[active][:, None], means[None], dim=2) / tau
    upstream = ((z.softmax(dim=1) - torch.eye(3)) / 3).detach()
    expected = torch.autograd.grad(z, [flat, prototypes], upstream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-14, rtol=1e-10)
    assert (found[1][2] == 0).all()


# DSMoE.


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_gates_of_a_token_sum_to_the_scale(top_k: int):
    layer = layer_of("dsmoe", moe__top_k=top_k, moe__gate_scale=2.5)
    x = tokens()
    assignment, routed = layer._route(x.flatten(0, 1), 10)
    sums_S = torch.zeros(30, dtype=torch.float64).index_add(
        0, assignment.token_index, assignment.gates.detach()
    )
    scores_SE = (x.flatten(0, 1) @ layer.router.t()).sigmoid()
    expected_S = torch.full_like(sums_S, 2.5)
    if top_k == 1:
        expected_S = 2.5 * (scores_SE * routed.selected_ES.t()).sum(dim=1)
    torch.testing.assert_close(sums_S, expected_S.detach(), atol=1e-12, rtol=0)


def test_a_bias_decides_who_is_chosen_and_no_gate():
    layer = layer_of("dsmoe", moe__top_k=2)
    layer.selection_bias[3] = 10.0
    assignment, routed = layer._route(tokens().flatten(0, 1), 10)
    assert routed.selected_ES[3].all()
    assert assignment.gates.max() < 1


def test_the_bias_moves_against_the_load_by_its_rate():
    layer = layer_of("dsmoe", moe__balance_rate=0.01)
    layer.move(torch.tensor([10.0, 2.0, 6.0, 6.0]))
    expected = torch.tensor([-0.01, 0.01, 0.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(layer.selection_bias, expected, atol=1e-9, rtol=0)


def test_biases_balance_a_router_that_prefers_one_expert():
    layer = layer_of("dsmoe", moe__balance_rate=0.02).train()
    x = tokens(8, 32)
    x[..., 0] = 2.0
    with torch.no_grad():
        layer.router[:, 0] = torch.tensor([2.0, 0.0, 0.0, -2.0])
    first = layer(x)[1].selected_ES.sum(dim=1)
    for _ in range(200):
        layer.move(layer(x)[1].seen_X)
    last = layer(x)[1].selected_ES.sum(dim=1)
    assert first.max() > 200
    assert last.max() < 100  # of 64 each


# All.


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
