"""Parameters that do not train: outside of DeepSpeed, in fp32 shared out to ranks like masters."""

from typing import NamedTuple, cast

import torch.distributed as dist
from torch import Tensor, nn

from diffmoe.parallel.topology import Topology


class FrozenPart(NamedTuple):
    """This rank's piece of a parameter, [start, start + len(master)) of its flattened elements.

    master: fp32; of an fp32 parameter a view. size: elements of a piece, the last one may be short.
    """

    parameter: nn.Parameter
    start: int
    master: Tensor
    size: int
    group: dist.ProcessGroup | None


class Frozen:
    """The parameters of a network without `requires_grad`. Every rank holds a piece of each."""

    def __init__(self, network: nn.Module, experts: dict[str, nn.Parameter]) -> None:
        """experts: by name, those of which every expert-parallel rank holds its own."""
        topology = cast(Topology, network.topology)
        self.parts: dict[str, FrozenPart] = {}
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                continue
            group = topology.expert_data_group if name in experts else topology.world_group
            size = -(-parameter.numel() // dist.get_world_size(group))
            flat = parameter.detach().view(-1)
            start = min(dist.get_rank(group) * size, len(flat))
            master = flat[start : start + size].float()
            self.parts[name] = FrozenPart(parameter, start, master, size, group)

    def spread(self) -> None:
        """Fill the parameters from all ranks' pieces. Every rank calls it."""
        for part in self.parts.values():
            flat = part.parameter.detach().view(-1)
            piece = flat.new_zeros(part.size)
            piece[: len(part.master)] = part.master
            whole = flat.new_empty(part.size * dist.get_world_size(part.group))
            dist.all_gather_into_tensor(whole, piece, part.group)
            flat.copy_(whole[: len(flat)])


def hide_from_deepspeed(experts: dict[str, nn.Parameter]) -> None:
    """Keep the engine from broadcasting frozen experts of one rank to others that hold others."""
    for parameter in experts.values():
        if not parameter.requires_grad:
            parameter.ds_optim_param = True  # type: ignore[attr-defined]  # DeepSpeed reads it
