"""Counts collectives below all wrappers: what the backend is asked for."""

from collections import Counter
from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """While entered: bytes and calls of every collective of more than one rank, by its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name.startswith("_c10d_functional::all_to_all_single"):
            self._count("all_to_all", [args[0]])
        elif name.startswith("c10d::alltoall_base_"):
            self._count("all_to_all", [args[1]])
        elif name.startswith("c10d::allreduce_"):
            # DeepSpeed also reduces over groups of one rank: nothing moves.
            if dist.ProcessGroup.unbox(args[1]).size() > 1:
                self._count("all_reduce", args[0])
        elif name.startswith("c10d::_allgather_base_"):
            self._count("all_gather", [args[0]])
        elif name.startswith("c10d::allgather_"):
            self._count("all_gather", args[0][0])
        elif "c10d" in name and "wait_tensor" not in name and "autograd" not in name:
            self._count(name, [])
        return function(*args, **(kwargs or {}))

    def _count(self, kind: str, tensors: Iterable[Tensor]) -> None:
        self.calls[kind] += 1
        self.bytes[kind] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
