"""Routing by hand: small scores whose right answer can be read off the page."""

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from diffmoe.models import routing
from diffmoe.models.routing import expert_capacity
from tests.helpers.networks import random_scores


def mask(*rows: str) -> Tensor:
    """mask("x.x", ".x.") -> a boolean (2, 3)."""
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


@pytest.mark.parametrize(
    ("tokens", "experts", "capacity", "k"),
    [
        (16, 4, 1.0, 4),
        (16, 4, 1.5, 6),
        (18, 4, 1.0, 4),  # rounded down
        (16, 4, 0.3, 1),
        (3, 16, 1.0, 1),  # S * C < E: at least one
        (1, 16, 1.0, 1),
        (4, 2, 8.0, 4),  # never more than there are
        (1, 1, 2.0, 1),
        (0, 4, 1.0, 0),  # none of none
    ],
)
def test_an_expert_takes_k_of_eq_6_at_least_one_at_most_all(
    tokens: int, experts: int, capacity: float, k: int
):
    assert expert_capacity(tokens, experts, capacity) == k


# The decimal that is written, or the ratio that is computed: K knows both by their digits.
EXACT = [*map(Fraction, ("0.1", "0.3", "0.7", "1.1", "1.4", "2.9")), *map(Fraction, (1, 2))]
EXACT += [Fraction(1, 3), Fraction(2, 3), Fraction(7, 6), Fraction(22, 7)]


@pytest.mark.parametrize("experts", range(1, 65))
def test_k_is_exact_for_every_number_of_experts(experts: int):
    for tokens in range(1, 300):
        assert expert_capacity(tokens, experts, float(experts)) == tokens
        for capacity in EXACT:
            exact = math.floor(tokens * min(capacity, experts) / experts)
            capacity = float(min(capacity, experts))
            assert expert_capacity(tokens, experts, capacity) == max(1, exact)


def test_k_of_the_release_is_that_of_its_floats():
    lost = set()
    for experts in range(1, 65):
        for tokens in range(experts, 300):
            for capacity in {0.7, 1.0, min(2.0, experts), float(experts)}:
                k = expert_capacity(tokens, experts, capacity, "release")
                assert k == max(1, int(tokens / experts * capacity))
                if k < expert_capacity(tokens, experts, capacity):
                    lost.add(experts)
    assert {7, 11, 13, 14} <= lost


def test_router_scores_are_a_softmax_over_experts():
    tokens = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    weight = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    expected = torch.tensor([[3 / 4, 1 / 4], [1 / 10, 9 / 10]])
    scores = routing.router_scores(routing.router_logits(tokens, weight), "softmax")
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(
    ("dtype", "scores_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_router_scores_are_fp32_at_least(dtype: torch.dtype, scores_dtype: torch.dtype):
    tokens, weight = torch.randn(3, 8, dtype=dtype), torch.randn(4, 8, dtype=dtype)
    scores = routing.router_scores(routing.router_logits(tokens, weight), "softmax")
    assert scores.dtype == scores_dtype
    # Rounded to bf16 the rows would miss 1 by up to 4e-3.
    torch.testing.assert_close(scores.sum(1), torch.ones_like(scores[:, 0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("k", "taken"), [(0, "....."), (1, ".x..."), (2, ".x.x."), (3, ".xxx."), (5, "xxxxx")]
)
def test_top_k_takes_the_largest_and_ties_fall_to_the_lower_token(k: int, taken: str):
    values = torch.tensor([[0.1, 0.5, 0.3, 0.5, 0.3]])
    assert torch.equal(routing.top_k_mask(values, k), mask(taken))


def test_top_k_of_equal_scores_takes_the_first_tokens():
    values = torch.full((2, 6), 0.25)
    assert torch.equal(routing.top_k_mask(values, 2), mask("xx....", "xx...."))


def test_top_k_treats_both_zeros_as_equal():
    assert torch.equal(routing.top_k_mask(torch.tensor([[-0.0, 0.0, -0.0]]), 2), mask("xx."))


@pytest.mark.parametrize("levels", [0, 3])
def test_top_k_takes_k_and_none_is_better_than_the_taken(levels: int):
    values = random_scores(50, 8, levels).t()
    for k in (1, 7, 49, 50):
        taken = routing.top_k_mask(values, k)
        assert (taken.sum(dim=1) == k).all()
        best_left = values.masked_fill(taken, -1).amax(dim=1)
        assert (values.masked_fill(~taken, 2).amin(dim=1) >= best_left).all()


def test_select_largest_takes_all_above_and_the_first_equals():
    values = torch.tensor([[3.0, 2.0, 2.0, 1.0, 2.0]])
    kth = torch.tensor([2.0])
    for ties, taken in [(0, "x...."), (1, "xx..."), (2, "xxx.."), (3, "xxx.x")]:
        assert torch.equal(routing.select_largest(values, kth, torch.tensor([ties])), mask(taken))


def test_static_assignment_lists_tokens_in_token_order_with_their_gates():
    scores = torch.arange(8.0).view(4, 2)  # token s gives expert i the score 2 s + i
    assigned = routing.static_assignment(mask(".x.x", "x..x"), scores, 2)
    assert assigned.token_index.tolist() == [[1, 3], [0, 3]]
    assert assigned.gates.tolist() == [[2.0, 6.0], [1.0, 7.0]]
    assert assigned.counts_E is None


def test_ragged_assignment_lists_pairs_by_expert_in_token_order():
    scores = torch.arange(12.0).view(4, 3)
    assigned = routing.ragged_assignment(mask(".x.x", "....", "xx.x"), scores)
    assert assigned.token_index.tolist() == [1, 3, 0, 1, 3]
    assert assigned.gates.tolist() == [3.0, 9.0, 2.0, 5.0, 11.0]
    assert assigned.counts_E.tolist() == [2, 0, 3]


@pytest.mark.parametrize(("tokens", "k"), [(24, 5), (24, 24), (1, 1), (0, 0)])
def test_static_and_ragged_assignments_of_one_mask_agree(tokens: int, k: int):
    scores = random_scores(tokens, 4)
    taken = routing.top_k_mask(scores.t(), k)
    static = routing.static_assignment(taken, scores, k)
    ragged = routing.ragged_assignment(taken, scores)
    assert static.token_index.shape == static.gates.shape == (4, k)
    assert torch.equal(static.token_index.flatten(), ragged.token_index)
    assert torch.equal(static.gates.flatten(), ragged.gates)
    assert ragged.counts_E.tolist() == [k] * 4


def test_when_every_token_wants_one_expert_the_others_still_take_k():
    scores = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(8, 4)
    taken = routing.top_k_mask(scores.t(), 2)
    assert torch.equal(taken, mask(*["xx......"] * 4))
    assigned = routing.static_assignment(taken, scores, 2)
    assert assigned.gates.tolist() == [[1.0, 1.0]] + [[0.0, 0.0]] * 3


def test_expert_choice_takes_the_best_tokens_of_each_sample():
    # Two samples of four tokens, two experts: K = 4 / 2 * 1 = 2 in each sample, although all of
    # the second sample's scores for expert 0 are lower than the first's.
    first = torch.tensor([0.9, 0.7, 0.8, 0.6, 0.1, 0.2, 0.4, 0.3])
    scores = torch.stack([first, 1 - first], dim=1)
    taken = routing.expert_choice_mask(scores, tokens_per_sample=4, k=2)
    assert torch.equal(taken, mask("x.x...xx", ".x.xxx.."))


def test_expert_choice_of_a_sample_does_not_see_its_batch():
    scores = random_scores(3 * 8, 4, levels=4)
    together = routing.expert_choice_mask(scores, 8, 2)
    for sample in range(3):
        tokens = slice(8 * sample, 8 * sample + 8)
        alone = routing.expert_choice_mask(scores[tokens], 8, 2)
        assert torch.equal(alone, together[:, tokens])


def test_expert_choice_of_no_samples_is_empty():
    assert routing.expert_choice_mask(torch.zeros(0, 4), 8, 2).shape == (4, 0)


def test_token_choice_takes_the_best_experts_and_ties_fall_to_the_lower_expert():
    scores = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4], [0.1, 0.45, 0.45]])
    assert torch.equal(routing.token_choice_mask(scores, 1), mask(".x.", "x.x", "..."))
    assert torch.equal(routing.token_choice_mask(scores, 2), mask(".x.", "x.x", "xxx"))
    equal = torch.full((2, 4), 0.25)
    assert torch.equal(routing.token_choice_mask(equal, 3), mask("xx", "xx", "xx", ".."))


def test_counted_mask_gives_every_expert_its_number_of_best_tokens():
    scores = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.1, 0.3], [0.1, 0.0, 0.4], [0.8, 0.0, 0.3]])
    taken = routing.counted_mask(scores, torch.tensor([3, 0, 2]))
    assert torch.equal(taken, mask("xx.x", "....", "x.x."))  # ties to the lower token
    everything = routing.counted_mask(scores, torch.tensor([4, 4, 4]))
    assert everything.all()
    assert routing.counted_mask(torch.zeros(0, 3), torch.zeros(3, dtype=torch.long)).shape == (3, 0)


@pytest.mark.parametrize("levels", [0, 3])
def test_counted_mask_with_equal_counts_is_top_k(levels: int):
    scores = random_scores(40, 4, levels)
    counted = routing.counted_mask(scores, torch.full((4,), 11))
    assert torch.equal(counted, routing.top_k_mask(scores.t(), 11))


def test_load_balancing_loss_is_one_when_balanced_and_e_when_collapsed():
    uniform = torch.full((8, 4), 0.25)
    balanced = mask("xx......", "..xx....", "....xx..", "......xx")
    assert routing.load_balancing_loss(uniform, balanced).item() == 1.0
    two_each = balanced | balanced.roll(1, dims=0)  # top-2: each expert twice as often
    assert routing.load_balancing_loss(uniform, two_each).item() == 1.0
    collapsed = torch.tensor([[1.0, 0.0, 0.0, 0.0]]).expand(8, 4)
    all_first = mask("xxxxxxxx", *["........"] * 3)
    assert routing.load_balancing_loss(collapsed, all_first).item() == 4.0


def test_load_balancing_loss_pushes_scores_away_from_the_crowded_expert():
    logits = torch.zeros(4, 2, requires_grad=True)
    routing.load_balancing_loss(logits.softmax(1), mask("xxxx", "....")).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1] < 0).all()
