"""A network called under torch.autocast: what decides and what adds up stays in fp32."""

import pytest
import torch

from diffmoe.models.dit import DiT
from diffmoe.models.moe import routing_loss
from diffmoe.models.routing_mode import RoutingMode
from diffmoe.training.routing_state import RoutingState
from tests.helpers.networks import WAYS, WIDTH, tiny_layer, tokens
from tests.helpers.tiny import BYTES, FROZEN, random_batch, randomize, tiny_config

TYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_scores_are_bit_for_bit_those_of_fp32_and_combining_rounds_like_fp32(way, dtype):
    layer = tiny_layer(way)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.zero_()
        constants_E = torch.tensor([1.0, 2.0, 4.0, 8.0])  # exact in every type
        layer.experts.b_out.copy_(constants_E[:, None])
    x = tokens(3, 10)
    flat_SD = x.flatten(0, 1)
    expected, _ = layer._route(flat_SD, 10)
    with torch.autocast("cpu", dtype):
        assigned, layer_routing = layer._route(flat_SD, 10)
        y, _ = layer(x)
    gates_SE = torch.nn.functional.linear(flat_SD, layer.router).softmax(dim=1)
    wanted_S = (gates_SE * layer_routing.selected_ES.t() * constants_E).sum(dim=1)
    assert y.dtype == torch.float32
    # bf16 would be off by up to 2^-8 of 8.
    torch.testing.assert_close(
        y.flatten(0, 1), wanted_S[:, None].expand(-1, WIDTH), atol=1e-6, rtol=0
    )
    assert assigned.gates.dtype == torch.float32
    if layer_routing.capacity_logits_SE is not None:
        assert layer_routing.capacity_logits_SE.dtype == torch.float32
    if way[0] != "diffmoe" or way[2] or way[1] == "static":  # no predictor decides
        assert torch.equal(assigned.token_index, expected.token_index)
        assert torch.equal(assigned.gates, expected.gates)


# With C = E, all experts take all tokens, so that no rounding changes a choice.
VARIANTS = {
    "every_block": {"moe__every_block": True},
    "swiglu": {"moe__activation": "swiglu", "moe__shared_expert_ratio": 2.0},
    "rope": {"model__rope": True, "model__qk_norm": True},
    "odd widths": {"model__width": 12, "model__heads": 3, "moe__expert_ratio": 1.5},
    "bytes": {"model__text": BYTES},
    "features": {"model__text": FROZEN},
    "expert choice": {"moe__type": "expert_choice"},
    "token choice": {"moe__type": "token_choice", "moe__top_k": 4},
    "dense": {"moe__type": "dense"},
}


def inputs_of(config) -> tuple:
    batch = random_batch(config, 0, range(config.data.lanes))
    times = torch.linspace(0.1, 0.9, len(batch.labels))
    return batch.latents, times, batch.text or batch.labels


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("inference", ["per_token", "pooled", "static"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_evaluation_is_close_to_fp32(variant: str, inference: str, dtype: torch.dtype):
    config = tiny_config(moe__inference=inference, moe__capacity=4.0, **VARIANTS[variant])
    network = randomize(DiT(config.model, config.moe)).eval()
    if inference != "static" and network.routing is not None:
        calibrated = torch.full((len(network.moe_layers), 4), -1e9)
        network.routing = RoutingMode(inference, calibrated_LE=calibrated)
    inputs = inputs_of(config)
    with torch.inference_mode():
        expected = network(*inputs).prediction
        with torch.autocast("cpu", dtype):
            output = network(*inputs)
    assert output.prediction.dtype == torch.float32
    off = (output.prediction - expected).norm() / expected.norm()
    assert 0 < off < 0.02


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_gradients_are_close_to_fp32(
    variant: str, dtype: torch.dtype, checkpointing: bool
):
    config = tiny_config(moe__capacity=4.0, **VARIANTS[variant])
    network = randomize(DiT(config.model, config.moe)).train()
    network.checkpoint_activations(checkpointing)
    inputs, parameters = inputs_of(config), list(network.parameters())
    found = []
    for active in (False, True):
        with torch.autocast("cpu", dtype, enabled=active):
            output = network(*inputs)
            tracker = RoutingState(network)
            tracker.observe(output.routing)
            loss = output.prediction.square().mean()
            loss = loss + routing_loss(output.routing, config.moe)
        assert loss.dtype == tracker.seen().dtype == torch.float32
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        found.append(torch.cat([g.flatten() for g in gradients if g is not None]))
    off = (found[1] - found[0]).norm() / found[0].norm()
    assert 0 < off < 0.04
