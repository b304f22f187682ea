"""Expert race against closed forms."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.models import routing
from diffmoe.models.dit import DiT
from diffmoe.models.families.race import router_similarity
from diffmoe.models.routing_mode import RoutingMode
from diffmoe.parallel.pool import TokenPool
from tests.helpers.families import EXPERTS, hidden, layer_of, network_of, tokens
from tests.helpers.networks import examples
from tests.helpers.tiny import randomize, tiny_config


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
