"""Ranks of a tool that hold the experts together."""

import torch
import torch.distributed as dist

from diffmoe.errors import UserError
from diffmoe.parallel.topology import Topology, create_topology
from diffmoe.resumable import Ranks


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
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return create_topology(expert_parallel)
