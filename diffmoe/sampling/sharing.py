"""Ranks of a tool that share the experts."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from diffmoe.errors import UserError
from diffmoe.parallel.backend import choose_backend
from diffmoe.parallel.rendezvous import meet
from diffmoe.parallel.topology import Topology, create_topology
from diffmoe.work import Ranks


def equal_share(indices: range, rank: int, size: int) -> list[int]:
    """One rank's part of the indices. All parts are equally long, as ranks that share experts need.

    The last parts repeat the last index where the number is not divisible.
    """
    each = -(-len(indices) // size)
    first = indices.start + rank * each
    return [min(index, indices[-1]) for index in range(first, first + each)]


def share_experts(expert_parallel: int, ranks: Ranks, device: torch.device) -> Topology:
    """The groups of P ranks; with P = 1 no process group is made.

    Raises UserError where P does not divide the number of ranks.
    """
    if expert_parallel < 1 or ranks.world % expert_parallel:
        raise UserError(
            f"--expert-parallel {expert_parallel} does not divide the {ranks.world} ranks started"
        )
    if expert_parallel == 1:
        return Topology()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # srun uses other names.
    os.environ |= {"RANK": str(ranks.rank), "WORLD_SIZE": str(ranks.world)}
    store, rank, world = meet()
    timeout = timedelta(hours=12)  # ranks wait while one of them judges the images of all
    store.set_timeout(timeout)
    backend = choose_backend(device, store, world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return create_topology(expert_parallel)
