"""What all ranks must agree on: named values in, named values out."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sum_over_ranks(
    numbers: Mapping[str, float], tensors: Mapping[str, Tensor], device: torch.device
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """The sums of all values over the ranks, by the same names, in double; waits for no device.

    Every rank of the default process group calls it with the same names and shapes. One all-reduce
    on the CPU; on another device one there for the tensors, and one on the CPU for the numbers.

    numbers: their sums come back as floats.
    tensors: of any shape and type, also empty. Their sums stay on the device, in double.
    """
    scalars = torch.tensor(list(numbers.values()), dtype=torch.double)
    flat = [tensor.flatten().to(device, torch.double) for tensor in tensors.values()]
    if device.type == "cpu":
        packed = torch.cat([scalars, *flat])
        dist.all_reduce(packed)
        scalars, rest = packed.split([len(scalars), len(packed) - len(scalars)])
    else:
        dist.all_reduce(scalars)
        rest = torch.cat(flat)
        dist.all_reduce(rest)
    parts = rest.split([tensor.numel() for tensor in tensors.values()])
    sums = {
        name: part.view(tensor.shape)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }
    return dict(zip(numbers, scalars.tolist(), strict=True)), sums


def disagreements(values: dict[str, Any]) -> list[str]:
    """A line for each field that some rank holds otherwise than rank 0, such as

        seed: 7 on rank 1, 0 on rank 0

    The same lines on every rank; none where all agree. One small collective then, a second one
    otherwise. Every rank of the default process group must call it.

    values: what JSON can hold, by name; a name that a rank lacks is `absent` there.
    """
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    if len(set(_gathered(digest))) == 1:
        return []
    everyone = _gathered(values)
    lines = []
    for field in sorted({name for theirs in everyone for name in theirs}):
        shown = [str(theirs.get(field, "absent")) for theirs in everyone]
        for other in dict.fromkeys(shown):  # in the order of the ranks
            if other != shown[0]:
                ranks = [rank for rank, value in enumerate(shown) if value == other]
                lines.append(f"{field}: {other} on {ranks_named(ranks)}, {shown[0]} on rank 0")
    return lines


def from_first_rank(value: Any) -> Any:
    """What rank 0 sees, where file systems may not show all ranks the same."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0)
    return values[0]


def ranks_named(ranks: list[int]) -> str:
    """`rank 3`, or `ranks 1, 2, 5`; at most eight by number."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"ranks {', '.join(map(str, ranks[:8]))}{more}"


def _gathered(value: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone
