"""How evaluation routes is one value: it fits the network or is refused, and goes back whole."""

import pytest
import torch

from diffmoe.errors import UserError
from diffmoe.models.routing_mode import RoutingMode
from tests.helpers.networks import CONFIG, network_of
from tests.helpers.tiny import tiny_config

CALIBRATED = torch.arange(8.0).view(2, 4)


def held(network) -> list[tuple]:
    """What the layers go by."""
    odds = [layer.calibrated_E for layer in network.moe_layers]
    return [
        (layer.inference, layer.capacity, None if own is None else own.tolist())
        for layer, own in zip(network.moe_layers, odds, strict=True)
    ]


def test_a_mode_reaches_every_layer_and_leaves_nothing_behind():
    network = network_of(tiny_config(moe__inference="pooled", moe__capacity=2.0))
    usual = [("pooled", 2.0, None)] * 2
    assert (network.routing.kind, held(network)) == ("pooled", usual)
    with network.routed(RoutingMode("static", 0.5)):
        assert held(network) == [("static", 0.5, None)] * 2
        with network.routed(RoutingMode(calibrated_LE=CALIBRATED)):
            assert held(network) == [("per_token", 2.0, row.tolist()) for row in CALIBRATED]
        assert held(network) == [("static", 0.5, None)] * 2
    assert held(network) == usual
    with pytest.raises(ZeroDivisionError), network.routed(RoutingMode("static", 0.5)):
        _ = 1 / 0
    assert held(network) == usual


def test_route_by_keeps_the_thresholds():
    network = network_of(CONFIG)
    network.routing = RoutingMode(calibrated_LE=CALIBRATED)
    network.route_by("static", 0.5)
    assert held(network) == [("static", 0.5, row.tolist()) for row in CALIBRATED]


@pytest.mark.parametrize("family", ["expert_choice", "token_choice", "dense"])
def test_a_family_that_routes_in_one_way_takes_no_other(family):
    network = network_of(tiny_config(moe__type=family))
    assert network.routing is None
    for mode in (RoutingMode("static"), RoutingMode("pooled"), RoutingMode()):
        with pytest.raises(UserError, match=f"routing {mode.kind}: a {family} model"):
            network.routing = mode
    with pytest.raises(UserError, match="routing static"):
        network.route_by("static")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("best",), "routing best: choose per_token, pooled or static"),
        (("per_token", 0.5), "capacity 0.5 belongs to static routing; per_token uses threshold"),
        (("static", 4.5), "capacity 4.5: choose one above 0, at most 4"),
        (("static", float("nan")), "capacity nan: choose one above 0, at most 4"),
    ],
)
def test_a_mode_that_cannot_be_is_refused(words, message):
    network = network_of(CONFIG)
    with pytest.raises(UserError, match=message):
        network.route_by(*words)
    assert network.routing.kind == "per_token"
