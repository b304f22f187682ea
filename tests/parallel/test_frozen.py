"""Frozen parameters are filled from the pieces that ranks hold of them."""

import pytest
import torch

from diffmoe.models.dit import DiT
from diffmoe.models.frozen import freeze
from diffmoe.parallel.frozen import Frozen
from diffmoe.parallel.topology import create_topology
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import randomize, tiny_config


@torch.no_grad()
def spread_on_rank(expert_parallel: int) -> tuple[int, int]:
    """-> how many parameters are frozen, and how many of these are as all ranks' pieces have it."""
    config = tiny_config(training__freeze=("blocks.*", "final.bias"))
    network = randomize(DiT(config.model, config.moe, create_topology(expert_parallel))).to_bf16()
    freeze(network, config.training)
    frozen = Frozen(network, network.expert_parameters())
    before = {name: part.parameter.clone() for name, part in frozen.parts.items()}
    for part in frozen.parts.values():
        part.master.add_(1)  # of bf16 parameters a copy
    frozen.spread()
    right = [
        torch.equal(part.parameter, (before[name].float() + 1).to(part.parameter.dtype))
        for name, part in frozen.parts.items()
    ]
    return len(right), sum(right)


@pytest.mark.parametrize("expert_parallel", [1, 2])
def test_frozen_parameters_are_filled_from_all_ranks(expert_parallel: int):
    for frozen, right in run_ranks(2, spread_on_rank, expert_parallel):
        assert frozen > 40
        assert right == frozen
