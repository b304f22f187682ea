"""What is counted: capacity by time, layer and expert, and the parameters at work."""

import pytest
import torch

from diffmoe.capacity.forward import Forward
from diffmoe.capacity.meter import CapacityMeter, activated_parameters, merged
from diffmoe.models.dit import DiT
from diffmoe.models.moe import LayerRouting
from diffmoe.recipes import load_config
from tests.helpers.networks import CONFIG, network_of
from tests.helpers.tiny import tiny_config


def forward(time: float, *counts: tuple[int, int], tokens: int = 8) -> Forward:
    """Two experts that take so many of the tokens, in each layer."""
    layers = [
        LayerRouting(torch.arange(tokens).expand(2, -1) < torch.tensor(count)[:, None])
        for count in counts
    ]
    return Forward(torch.tensor(time), False, layers)


def test_the_meter_counts_by_time_layer_and_expert():
    meter = CapacityMeter()
    meter(forward(0.5, (8, 4), (2, 2)))
    meter(forward(0.0, (4, 4), (4, 4)))
    meter(forward(0.5, (0, 0), (8, 8), tokens=24))
    seen = meter.read()
    assert seen.times.tolist() == [0.0, 0.5]
    assert seen.tokens.tolist() == [8, 32]
    assert seen.capacity[0].tolist() == [[1, 1], [1, 1]]  # 2 experts x 4 of 8 tokens
    assert seen.capacity[1].tolist() == [[0.5, 0.25], [0.625, 0.625]]  # 2 x 8 of 32, ...
    assert seen.by_time.tolist() == [1.0, 0.5]
    expected = torch.tensor([[0.6, 0.4], [0.7, 0.7]], dtype=torch.float64)
    torch.testing.assert_close(seen.by_layer_and_expert, expected)
    assert seen.average == pytest.approx(0.6)
    assert meter.read() is None


def test_parts_merge_as_if_they_had_been_one():
    forwards = [forward(0.1 * i, (i, 8 - i), (8, i)) for i in (0, 3, 5, 3)]
    whole, first, second = CapacityMeter(), CapacityMeter(), CapacityMeter()
    for number, one in enumerate(forwards):
        whole(one)
        (first if number < 2 else second)(one)
    for joined, expected in zip(merged([first.read(), second.read()]), whole.read(), strict=True):
        torch.testing.assert_close(joined, expected)


def counted(network: DiT, routing: list[LayerRouting], tokens: int) -> float:
    """Parameters at work on an average token, expert by expert."""
    names = network.expert_parameters()
    total = sum(p.numel() for name, p in network.named_parameters() if name not in names)
    for layer, decided in zip(network.moe_layers, routing, strict=True):
        for expert, taken in enumerate(decided.selected_ES.sum(dim=1).tolist()):
            size = sum(parameter[expert].numel() for parameter in layer.experts.parameters())
            total += size * taken / tokens
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe__every_block": True},
        {"moe__shared_expert_ratio": 2.0, "moe__activation": "swiglu"},
        {"moe__type": "dense"},
    ],
    ids=["every second block", "every block", "shared expert, SwiGLU", "dense"],
)
def test_activated_parameters_equal_a_count(changes):
    network = network_of(tiny_config(**changes))
    meter = CapacityMeter()
    with torch.no_grad():
        routing = network(torch.randn(3, 2, 8, 8), torch.rand(3), torch.arange(3)).routing
    meter(Forward(torch.tensor(0.0), False, routing))
    seen = meter.read()
    expected = counted(network, routing, 3 * 16)
    assert activated_parameters(network, seen and seen.average) == pytest.approx(expected)


def test_activated_parameters_of_every_second_block_are_the_papers():
    # Eq. 40: (1 + C) / (1 + N) of all feed-forwards, and the rest; E16, S size.
    config = load_config("diffmoe_s_e16_flow")
    with torch.device("meta"):
        network = DiT(config.model, config.moe)
    hidden = 4 * 384
    feed_forward = 2 * 384 * hidden + hidden + 384
    feed_forwards = 6 * (1 + 16) * feed_forward
    rest = network.parameter_count() - feed_forwards
    for capacity in (0.4, 1.0, 16.0):
        expected = (1 + capacity) / (1 + 16) * feed_forwards + rest
        assert activated_parameters(network, capacity) == pytest.approx(expected)
    assert activated_parameters(network, 16.0) == network.parameter_count()


def test_a_dense_network_has_no_capacity():
    meter = CapacityMeter()
    meter(Forward(torch.tensor(0.0), False, []))
    assert meter.read() is None
    network = network_of(tiny_config(moe__type="dense"))
    assert activated_parameters(network, None) == network.parameter_count()
    assert network_of(CONFIG).has_thresholds
    assert not network.has_thresholds
