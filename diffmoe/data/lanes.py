"""The order of the data, as arithmetic: V endless lanes over shuffled shards. No reading here.

In epoch e the shards are permuted by (seed, "shards", e) and lane v takes every V-th of them from
the v-th; the samples of a shard are permuted by (seed, "samples", e, shard). A lane's epochs follow
one another without a pause: lanes with fewer samples simply start their next epoch sooner.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from diffmoe.seeding import keyed_generator


class Position(NamedTuple):
    """Where a lane stands: `offset` samples into the `turn`-th of its shards in `epoch`."""

    epoch: int
    turn: int
    offset: int


def lane_shards(seed: int, epoch: int, lane: int, lanes: int, shards: int) -> list[int]:
    """Indices of the shards that `lane` of `lanes` reads in `epoch`, in reading order."""
    order = torch.randperm(shards, generator=keyed_generator(seed, "shards", epoch))
    return order[lane::lanes].tolist()


def sample_order(seed: int, epoch: int, shard: int, samples: int) -> list[int]:
    """The order in which the samples of shard number `shard` are read in `epoch`."""
    return torch.randperm(
        samples, generator=keyed_generator(seed, "samples", epoch, shard)
    ).tolist()


def position(counts: Sequence[int], seed: int, lane: int, lanes: int, offset: int) -> Position:
    """Where a lane stands after `offset` samples: whole epochs and shards are stepped over.

    counts: samples of every shard. The result always points at a sample that is still to be read.
    """
    epoch = 0
    while True:
        mine = lane_shards(seed, epoch, lane, lanes, len(counts))
        if sum(counts[shard] for shard in mine) == 0:
            raise ValueError(f"lane {lane} of {lanes} has no samples in {len(counts)} shards")
        for turn, shard in enumerate(mine):
            if offset < counts[shard]:
                return Position(epoch, turn, offset)
            offset -= counts[shard]
        epoch += 1
