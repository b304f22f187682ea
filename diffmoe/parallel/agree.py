"""What all ranks must agree on: named values in, named values out."""

import hashlib
import json
from typing import Any

import torch.distributed as dist


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
