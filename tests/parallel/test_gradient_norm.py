"""The gradient's norm is DeepSpeed's own, and it alone tells what is not finite."""

from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from diffmoe.config import Config
from diffmoe.data.examples import micro_batches
from diffmoe.diffusion import create_objective
from diffmoe.parallel.topology import create_topology
from diffmoe.training.step import build, losses_of
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import random_batch, randomize, tiny_config


def norms_on_rank(config: Config, spoiled: float | None) -> dict[str, Any]:
    """Of one step: our norm and DeepSpeed's of each group, whether it was skipped.

    spoiled: what one gradient of the last rank holds.
    """
    topology = create_topology(config.parallel.expert_parallel)
    network, engine = build(config, {}, topology, torch.device("cpu"))
    with torch.no_grad():
        randomize(network)
    zero, pairs = engine.optimizer, []
    ours = zero.get_grad_norm_direct

    def both(gradients, *arguments, **options):
        if spoiled is not None and topology.rank == topology.world - 1:
            gradients[0].view(-1)[0] = spoiled
        norm = ours(gradients, *arguments, **options)
        theirs = DeepSpeedZeroOptimizer.get_grad_norm_direct(zero, gradients, *arguments, **options)
        pairs.append((norm.item(), theirs.item()))
        return norm

    zero.get_grad_norm_direct = both
    lanes = config.data.lanes // topology.world
    mine = range(topology.rank * lanes, (topology.rank + 1) * lanes)
    objective = create_objective(config)
    weights = [master.clone() for master in zero.single_partition_of_fp32_groups]
    for one in micro_batches(random_batch(config, 0, mine), config, mine, 0, objective):
        engine.backward(losses_of(engine, objective, one, config)[0])
        engine.step()
    moved = any(
        not torch.equal(now, before)
        for now, before in zip(zero.single_partition_of_fp32_groups, weights, strict=True)
    )
    return {"norms": pairs, "overflow": bool(zero.overflow), "moved": moved}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_norm_is_that_of_deepspeed_bit_for_bit(precision: str, stage: int):
    config = tiny_config(
        parallel__expert_parallel=2,
        parallel__zero_stage=stage,
        training__precision=precision,
        training__accumulation=2,
        optimizer__gradient_clipping=0.5,
    )
    for told in run_ranks(2, norms_on_rank, config, None):
        assert len(told["norms"]) >= 2  # dense and experts; in bf16 what routes, too
        for ours, theirs in told["norms"]:
            assert ours == theirs > 0
        assert told == {"norms": told["norms"], "overflow": False, "moved": True}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_value_that_is_not_finite_skips_the_step_on_every_rank(precision: str, value: float):
    config = tiny_config(parallel__expert_parallel=2, training__precision=precision)
    for told in run_ranks(2, norms_on_rank, config, value):
        assert -1.0 in [ours for ours, _ in told["norms"]]
        assert all(ours == theirs for ours, theirs in told["norms"])
        assert told["overflow"]
        assert not told["moved"]
