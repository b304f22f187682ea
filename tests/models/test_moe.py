"""The MoE layer in one process: route, dispatch, experts, combine."""

import pytest
import torch
from torch import Tensor, nn

from diffmoe.models import routing
from tests.helpers.networks import (
    ALL_WAYS,
    WAYS,
    WIDTH,
    one_after_the_other,
    tiny_layer,
    tokens,
)


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_an_expert_filled_with_a_constant_comes_back_as_it_times_its_gate(
    way: tuple[str, str, bool],
):
    layer = tiny_layer(way)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.zero_()
        constants_E = torch.tensor([1.0, 2.0, 4.0, 8.0])
        layer.experts.b_out.copy_(constants_E[:, None])
    x = tokens(3, 10)
    y, layer_routing = layer(x)
    scores_SE = routing.router_logits(x.flatten(0, 1), layer.router).softmax(dim=-1)
    expected_S = (scores_SE * layer_routing.selected_ES.t() * constants_E).sum(dim=1)
    assert expected_S.count_nonzero() > 5
    # One rounding per added expert.
    torch.testing.assert_close(
        y.flatten(0, 1), expected_S[:, None].expand(-1, WIDTH), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_layer_equals_its_formula(way: tuple[str, str, bool], device: torch.device):
    layer = tiny_layer(way, moe__shared_expert_ratio=2.0).double().to(device)
    x = tokens(3, 10).double().to(device)
    y, layer_routing = layer(x)
    flat = x.flatten(0, 1)
    scores_SE = routing.router_logits(flat, layer.router).softmax(dim=-1)
    expected = layer.shared_expert(flat)
    for i, selected_S in enumerate(layer_routing.selected_ES):
        counts = [0] * 4
        counts[i] = len(flat)
        output = one_after_the_other(layer.experts, flat, counts)
        expected = expected + output * (scores_SE[:, i] * selected_S)[:, None]
    torch.testing.assert_close(y.flatten(0, 1), expected, atol=1e-12, rtol=0)  # float64 rounding


CROWDS = {
    "fewer tokens than experts": (1, 3, 8),
    "one token": (1, 1, 4),
    "one token per sample": (5, 1, 4),
    "many": (2, 16, 4),
}


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize("wish", ["any", "all scores equal", "every token wants one expert"])
@pytest.mark.parametrize("way", ALL_WAYS, ids=str)
def test_forward_and_backward_are_finite_in_corner_cases(
    way: tuple[str, str, bool], wish: str, crowd: str
):
    samples, per_sample, num_experts = CROWDS[crowd]
    layer = tiny_layer(way, moe__experts=num_experts)
    x = tokens(samples, per_sample)
    with torch.no_grad():
        if wish == "all scores equal":
            layer.router.zero_()
        if wish == "every token wants one expert":
            x[..., 0] = 1.0
            layer.router.zero_()
            layer.router[0, 0] = 200.0  # the other experts' scores underflow to 0
            if layer.capacity_predictor is not None:
                layer.capacity_predictor.out.weight.zero_()
                layer.capacity_predictor.out.bias.fill_(-50.0)[0] = 50.0
    y, layer_routing = layer(x)
    assert y.shape == x.shape
    assert layer_routing.selected_ES.shape == (num_experts, samples * per_sample)
    loss = y.square().sum()
    for extra in layer_routing.losses.values():
        loss = loss + extra
    loss.backward()
    assert x.grad.isfinite().all()
    assert y.isfinite().all()
    for name, gradient in gradients(layer).items():
        assert gradient is None or gradient.isfinite().all(), name
    counts_E = layer_routing.selected_ES.sum(dim=1)
    if way[0] == "expert_choice":
        k = routing.expert_capacity(per_sample, num_experts, 1.0)
        assert counts_E.tolist() == [k * samples] * num_experts
    elif way[0] == "diffmoe" and (way[2] or way[1] == "static"):
        k = routing.expert_capacity(samples * per_sample, num_experts, 1.0)
        assert counts_E.tolist() == [k] * num_experts
    elif wish == "every token wants one expert" and way[0] != "race":
        assert counts_E.tolist() == [samples * per_sample] + [0] * (num_experts - 1)


@pytest.mark.parametrize("way", [way for way in ALL_WAYS if not way[2]], ids=str)
@pytest.mark.parametrize("shared", [0.0, 2.0])
def test_no_samples_give_no_output_and_zero_gradients(way: tuple[str, str, bool], shared: float):
    layer = tiny_layer(way, moe__shared_expert_ratio=shared)
    x = tokens(0, 16)
    y, layer_routing = layer(x)
    assert y.shape == (0, 16, WIDTH)
    assert layer_routing.selected_ES.shape == (4, 0)
    y.sum().backward()
    for name, gradient in gradients(layer.experts).items():
        assert (gradient == 0).all(), name


def test_no_token_wanted_by_any_expert_gives_zero():
    layer = tiny_layer(("diffmoe", "per_token", False))
    layer.capacity_predictor.thresholds.fill_(1.0)  # no probability is above
    x = tokens(2, 16)
    y, layer_routing = layer(x)
    assert not layer_routing.selected_ES.any()
    assert (y == 0).all()
    y.sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize(("rounding", "k"), [("exact", 61), ("release", 60)])
@pytest.mark.parametrize("way", [way for way in WAYS if "token" not in way[0]], ids=str)
def test_the_layer_takes_k_as_it_is_told_to_round(way, rounding: str, k: int):
    layer = tiny_layer(way, moe__experts=7, moe__capacity=7.0, moe__capacity_rounding=rounding)
    _, layer_routing = layer(tokens(1, 61))
    if way[0] == "expert_choice" or way[2] or way[1] == "static":
        assert layer_routing.selected_ES.sum(dim=1).tolist() == [k] * 7


def test_the_capacity_loss_sends_no_gradient_into_tokens_or_router():
    layer = tiny_layer()
    x = tokens(2, 16)
    layer(x)[1].losses["capacity"].backward()
    assert x.grad is None
    for name, gradient in gradients(layer).items():
        assert (gradient is not None) == name.startswith("capacity_predictor"), name


def test_gates_of_a_bf16_layer_are_fp32():
    layer = tiny_layer().bfloat16()
    assignment, _ = layer._route(torch.randn(32, WIDTH, dtype=torch.bfloat16), 16)
    assert assignment.gates.dtype == torch.float32
