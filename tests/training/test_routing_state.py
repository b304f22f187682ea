"""A step moves thresholds and biases once, by the mean over its micro-batches."""

import pytest
import torch

from diffmoe.training.routing_state import RoutingState
from tests.helpers.families import network_of
from tests.helpers.networks import examples


@pytest.mark.parametrize("family", ["diffmoe", "race", "dsmoe"])
def test_a_step_sees_the_mean_over_micro_batches(family: str):
    network = network_of(family).train()
    routings = [network(*examples(4, seed=seed)).routing for seed in (1, 2)]
    alone = []
    for routing in routings:
        one = RoutingState(network)
        one.observe(routing)
        alone.append(one.seen())
    both = RoutingState(network)
    for routing in routings:
        both.observe(routing)
    assert not torch.equal(*alone)
    torch.testing.assert_close(both.seen(), (alone[0] + alone[1]) / 2, atol=1e-7, rtol=0)
    assert both.seen().shape == (2, 1 if family == "race" else 4)
    both.forget()
    assert both.seen().numel() == 0


@pytest.mark.parametrize("family", ["promoe", "token_choice", "dense"])
def test_what_has_no_state_shows_none(family: str):
    network = network_of(family).train()
    state = RoutingState(network)
    state.observe(network(*examples(4)).routing)
    assert state.seen().numel() == 0
    state.step(state.seen())
