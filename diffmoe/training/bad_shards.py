"""How many unreadable shards a run tolerates: data.max_bad_shards, counted over all ranks."""

import torch
import torch.distributed as dist

from diffmoe.data.stream import LatentStream
from diffmoe.errors import UserError


def count_bad_shards(stream: LatentStream, reported: float, device: torch.device) -> int:
    """The number of different shards that the ranks could not read.

    Every rank calls it. reported: the sum over ranks of what each could not read by itself; 0 needs
    no collective. Raises UserError, on every rank, beyond the source's max_bad_shards.
    """
    if not reported:
        return 0
    flags = stream.bad_flags().to(device)  # several ranks may have met the same shard
    dist.all_reduce(flags)
    bad = int(flags.count_nonzero())
    if bad > stream.source.max_bad_shards:
        raise UserError(
            f"all ranks together could not read {bad} shards (named above), more "
            f"than data.max_bad_shards={stream.source.max_bad_shards}; copy them again or pack "
            "the data again, or raise it"
        )
    return bad
