"""Closed forms of the numbers that tell of routing's health."""

import math

import pytest
import torch

from diffmoe.capacity import health
from diffmoe.models.experts import Experts
from tests.helpers.networks import tiny_layer, tokens


def test_a_selection_by_time_alone_is_explained_by_time():
    t_B = torch.tensor([0.9, 0.1, 0.8, 0.2])
    late_B = t_B > 0.5
    by_time_ES = torch.stack([late_B, ~late_B]).repeat_interleave(16, dim=1)
    assert health.time_share(by_time_ES, t_B).item() == pytest.approx(1)
    alike_ES = (torch.arange(16) < 5).repeat(2, 4)
    assert health.time_share(alike_ES, t_B).item() == pytest.approx(0)
    # Half of expert 0's variance: late samples give all tokens, early ones half of theirs.
    half_ES = torch.stack([torch.arange(16) < (16 if late else 8) for late in late_B]).view(1, -1)
    expected = (0.25**2) / (0.75 * 0.25)
    assert health.time_share(half_ES, t_B).item() == pytest.approx(expected)


def test_chance_explains_next_to_nothing():
    generator = torch.Generator().manual_seed(0)
    selected_ES = torch.rand(8, 64 * 64, generator=generator) < 0.125
    assert health.time_share(selected_ES, torch.rand(64, generator=generator)) < 0.01


def test_few_samples_tell_nothing_of_time():
    assert health.time_share(torch.ones(2, 30), torch.tensor([0.1, 0.5, 0.7])).isnan()


def test_entropy_and_dead_experts_of_loads():
    load_LE = torch.tensor([[1.0, 1, 1, 1], [4, 0, 0, 0], [2, 2, 0, 0], [2, 1.975, 0.005, 0.02]])
    expected = [1, 0, 0.5]
    assert health.load_entropy(load_LE)[:3].tolist() == pytest.approx(expected, abs=1e-6)
    assert health.dead_experts(load_LE).tolist() == [0, 3, 2, 1]
    assert health.load_entropy(torch.tensor([[7.0]])).tolist() == [1]  # no one to share it with


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_similarity_of_equal_opposite_and_single_experts(activation: str):
    experts = Experts(2, 16, 8, activation)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
            parameter[1] = parameter[0]
    seen = tokens(5).detach()
    assert health.weight_similarity(experts).item() == pytest.approx(1, abs=1e-6)
    assert health.output_similarity(experts, seen).item() == pytest.approx(1, abs=1e-6)
    with torch.no_grad():
        experts.w_out[1] *= -1
        if activation == "gelu":
            experts.b_out[1] *= -1
    assert health.output_similarity(experts, seen).item() == pytest.approx(-1, abs=1e-6)
    single = Experts(1, 16, 8, activation)
    assert math.isnan(health.weight_similarity(single))


def test_similarity_is_the_mean_over_pairs():
    experts = Experts(3, 4, 2, "gelu")
    with torch.no_grad():
        experts.w_in.copy_(torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0)))
    flat = experts.w_in.detach().flatten(1)
    pairs = [torch.cosine_similarity(flat[i], flat[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))]
    assert health.weight_similarity(experts).item() == pytest.approx(
        float(sum(pairs)) / 3, abs=1e-6
    )


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("diffmoe", {"moe__experts": 4, "moe__capacity": 4.0}, 1.0),  # a softmax over all
        ("diffmoe", {"moe__capacity": 4.0, "moe__gate_scale": 3.0}, 3.0),
        ("dsmoe", {"moe__top_k": 2, "moe__gate_scale": 2.5}, 2.5),
    ],
)
def test_the_sum_of_a_tokens_gates_is_told(family: str, changes: dict, expected: float):
    layer = tiny_layer((family, "per_token", True), **changes)
    assert layer(tokens(3, 10))[1].gate_sum.item() == pytest.approx(expected, rel=1e-5)
    assert layer.eval()(tokens(3, 10))[1].gate_sum is None


def test_an_expert_apart_counts_with_its_gate_of_one():
    layer = tiny_layer(("promoe", "per_token", True))
    nothing = torch.ones(3, dtype=torch.bool)
    assert layer(tokens(3, 10), None, None, nothing)[1].gate_sum == 1
