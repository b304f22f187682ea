"""A sample that has become NaN stays alone: what its batch mates are given holds for each family.

Expert choice, token choice, per_token: exactly as with any other mate. pooled: as in the batch
without it. Training's pool and static: it comes last, so the others share out all of K.
"""

import pytest
import torch
from torch import Tensor

from diffmoe.models import routing
from diffmoe.models.dit import DiT
from tests.helpers.networks import (
    ALL_WAYS,
    examples,
    one_after_the_other,
    random_scores,
    set_thresholds,
    tiny_layer,
    tokens,
)
from tests.helpers.tiny import randomize, tiny_config

BROKEN, OTHERS = 1, [0, 2, 3]
ALONE = [
    way for way in ALL_WAYS if way[0] not in ("diffmoe", "race") or way[1:] == ("per_token", False)
]
SHARED_POOL = [("diffmoe", "per_token", True), ("diffmoe", "static", False)]


def network_of(way: tuple[str, str, bool], **changes) -> DiT:
    family, inference, training = way
    config = tiny_config(moe__type=family, moe__inference=inference, **changes)
    network = randomize(DiT(config.model, config.moe)).train(training)
    set_thresholds(network)
    return network


def with_nan(x: Tensor, everywhere: bool) -> Tensor:
    x = x.detach().clone()
    x[BROKEN] = torch.nan if everywhere else x[BROKEN]
    x[BROKEN].view(-1)[0] = torch.nan
    return x


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("way", ALONE, ids=str)
@torch.no_grad()
def test_others_are_as_with_any_other_mate(way: tuple[str, str, bool], everywhere: bool):
    network, (x, t, labels) = network_of(way, moe__capacity=1.5), examples(4)
    expected = network(x, t, labels)
    broken = network(with_nan(x, everywhere), t, labels)
    assert broken.prediction[BROKEN].isnan().any()
    for ours, theirs in zip(broken.routing, expected.routing, strict=True):
        mine, wanted = (one.selected_ES.unflatten(1, (4, -1))[:, OTHERS] for one in (ours, theirs))
        assert torch.equal(mine, wanted)
    # Products of other row counts round differently; those of expert choice have the same.
    close = 0 if way[0] == "expert_choice" else 1e-5
    torch.testing.assert_close(
        broken.prediction[OTHERS], expected.prediction[OTHERS], atol=close, rtol=0
    )


@torch.no_grad()
def test_pooled_others_are_as_in_the_batch_without_it():
    network, (x, t, labels) = network_of(("diffmoe", "pooled", False)), examples(4)
    expected = network(x[OTHERS], t[OTHERS], labels[OTHERS])
    broken = network(with_nan(x, True), t, labels)
    for ours, theirs in zip(broken.routing, expected.routing, strict=True):
        selected_EBT = ours.selected_ES.unflatten(1, (4, -1))
        assert torch.equal(selected_EBT[:, OTHERS].flatten(1), theirs.selected_ES)
        assert not selected_EBT[:, BROKEN].any()
    torch.testing.assert_close(broken.prediction[OTHERS], expected.prediction, atol=1e-5, rtol=0)


@pytest.mark.parametrize("capacity", [1.0, 3.6])  # K = 10, and 36 of which 30 are not NaN
@pytest.mark.parametrize("way", SHARED_POOL, ids=str)
@torch.no_grad()
def test_others_share_out_the_whole_pool(way: tuple[str, str, bool], capacity: float):
    layer = tiny_layer(way, moe__capacity=capacity)
    x = with_nan(tokens(4, 10), True)
    y, layer_routing = layer(x)
    selected_EBT = layer_routing.selected_ES.unflatten(1, (4, 10))
    k = int(10 * capacity)
    assert layer_routing.selected_ES.sum(dim=1).tolist() == [k] * 4
    assert selected_EBT[:, BROKEN].sum(dim=1).tolist() == [max(0, k - 30)] * 4
    flat = x[OTHERS].flatten(0, 1)
    scores_SE = routing.router_logits(flat, layer.router).softmax(dim=-1)
    assert torch.equal(
        selected_EBT[:, OTHERS].flatten(1), routing.top_k_mask(scores_SE.t(), min(k, 30))
    )
    expected = torch.zeros_like(flat)
    for i, selected_S in enumerate(selected_EBT[:, OTHERS].flatten(1)):
        counts = [0] * 4
        counts[i] = len(flat)
        output = one_after_the_other(layer.experts, flat, counts)
        expected += output * (scores_SE[:, i] * selected_S)[:, None]
    torch.testing.assert_close(y[OTHERS].flatten(0, 1), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("way", ALL_WAYS, ids=str)
@torch.no_grad()
def test_a_batch_of_nothing_but_nan_is_nan(way: tuple[str, str, bool]):
    network, (x, t, labels) = network_of(way), examples(3)
    output = network(torch.full_like(x, torch.nan), t, labels)
    assert output.prediction.isnan().all()
    for layer in output.routing:
        counts_E = layer.selected_ES.sum(dim=1)
        if way[0] in ("token_choice", "dsmoe"):
            assert counts_E.sum() == 3 * 16
        elif way[0] == "promoe":
            assert counts_E.sum() == (labels < 5).sum() * 16
        elif way[0] in ("diffmoe", "race") and not way[2] and way[1] != "static":
            assert counts_E.tolist() == [0] * 4
        elif way[0] == "race":
            assert counts_E.sum() == 3 * 16
        else:
            assert counts_E.tolist() == [3 * 16 // 4] * 4


def test_a_static_assignment_repeats_no_token():
    scores = random_scores(12, 4)
    scores[3:9] = torch.nan
    taken = routing.top_k_mask(routing.ranked(scores).t(), 8)
    index_EK = routing.static_assignment(taken, scores, 8).token_index
    assert all(len(set(row)) == 8 for row in index_EK.tolist())
