"""DSMoE against closed forms."""

import pytest
import torch

from tests.helpers.families import layer_of, tokens


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
