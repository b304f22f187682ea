"""Ranks and their groups: data parallel, expert parallel, expert data parallel."""

import warnings
from dataclasses import dataclass

import torch.distributed as dist

from diffmoe.parallel.dispatch import Dispatch
from diffmoe.parallel.pool import TokenPool


@dataclass(frozen=True)
class Topology:
    """Where this rank stands. The default is one process without any process group.

    An expert-parallel group is P contiguous ranks (so that it sits inside a node); together they
    hold every expert once. The ranks with the same experts form an expert-data-parallel group.
    """

    rank: int = 0
    world: int = 1
    expert_parallel: int = 1
    expert_rank: int = 0
    expert_group: dist.ProcessGroup | None = None
    expert_data_group: dist.ProcessGroup | None = None
    world_group: dist.ProcessGroup | None = None

    def dispatch(self) -> Dispatch:
        return Dispatch(self.expert_group if self.expert_parallel > 1 else None)

    def token_pool(self, scope: str) -> TokenPool:
        """The pool of `moe.token_pool`: micro_batch, expert_parallel or global."""
        ranks = {"micro_batch": 1, "expert_parallel": self.expert_parallel, "global": self.world}
        groups = {"expert_parallel": self.expert_group, "global": self.world_group}
        return TokenPool(groups[scope] if ranks[scope] > 1 else None)


def destroy_topology() -> None:
    """Forget the groups, so that another topology can be created in this process."""
    from deepspeed.utils import groups
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    groups._WORLD_GROUP = None  # a clone of the process group that ends


def create_topology(expert_parallel: int) -> Topology:
    """Build the groups, by Megatron-Core, over the initialized default process group."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells at length which optional parts are missing
        from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(expert_model_parallel_size=expert_parallel)
    return Topology(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        expert_parallel=expert_parallel,
        expert_rank=parallel_state.get_expert_model_parallel_rank(),
        expert_group=parallel_state.get_expert_model_parallel_group(),
        expert_data_group=parallel_state.get_expert_data_parallel_group(),
        world_group=parallel_state.get_data_parallel_group(),
    )
