"""How often a training step sends tokens: two all-to-alls a layer forward, two backward."""

import pytest
import torch

from diffmoe.benchmarks.collectives import Collectives
from diffmoe.config import Config
from diffmoe.models.dit import DiT
from diffmoe.models.moe import routing_loss
from diffmoe.parallel.topology import create_topology
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import randomize, tiny_config


def all_to_alls_on_rank(config: Config) -> tuple[int, int]:
    network = randomize(DiT(config.model, config.moe, create_topology(2))).train()
    x = torch.randn(4, 2, 8, 8)
    with Collectives() as forward:
        output = network(x, torch.rand(4), torch.zeros(4, dtype=torch.long))
    loss = output.prediction.square().mean() + routing_loss(output.routing, config.moe)
    with Collectives() as backward:
        loss.backward()
    return forward.calls["all_to_all"], backward.calls["all_to_all"]


@pytest.mark.parametrize(("pool", "forward"), [("micro_batch", 2), ("global", 3)])
def test_a_layer_takes_two_all_to_alls_forward_and_two_backward(pool: str, forward: int):
    """In a wide pool the counts of rows go ahead, in a third."""
    config = tiny_config(moe__token_pool=pool, parallel__expert_parallel=2)
    layers = config.model.depth // 2
    for told in run_ranks(2, all_to_alls_on_rank, config):
        assert told == (forward * layers, 2 * layers)
