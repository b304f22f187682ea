"""The data as V endless lanes over shuffled shards: their order, and the reader of one lane.

In epoch e the shards are permuted by (seed, "shards", e), and lane v takes every V-th of them from
the v-th on; the samples of a shard are permuted by (seed, "samples", e, shard). A lane's epochs
follow one another without a pause: lanes with fewer samples simply start their next epoch sooner.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import torch

from diffmoe.data.fetching import ATTEMPTS, Fetch, ReadAhead, Unreadable
from diffmoe.data.manifest import Manifest
from diffmoe.data.reading import OpenShard, unreadable
from diffmoe.errors import UserError
from diffmoe.seeding import keyed_generator

# The order, as arithmetic


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
    """Where a lane stands after `offset` samples, found without reading any.

    counts: samples of every shard. The result always points at a sample that is still to be read.
    Raises ValueError if the lane has no samples.
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


# Reading


@dataclass(frozen=True)
class DataSource:
    """Shards, and the lanes in which they are read.

    lanes: V. seed: of the order and of all draws.
    max_bad_shards: how many different shards may be unreadable before reading stops.
    features_until: the clock up to which the image encoder's features are read, too.

    Raises UserError if there are fewer shards than lanes.
    """

    directory: str | Path
    manifest: Manifest
    lanes: int
    seed: int
    fetch: Fetch = field(default_factory=Fetch)
    max_bad_shards: int = 0
    features_until: float = 0

    def __post_init__(self) -> None:
        self.manifest.check_lanes(self.lanes)
        if self.features_until and self.manifest.features is None:
            raise ValueError(f"{self.features_until=}, but the manifest has no features")

    def address(self, number: int) -> str:
        """The path or URL of shard `number`."""
        return self.manifest.address(self.directory, self.manifest.shards[number])

    def too_many_bad_shards(self, address: str, reason: str) -> UserError:
        """The error for a bad shard that exceeds the limit."""
        way_out = f"or set data.max_bad_shards (now {self.max_bad_shards}) to continue without it"
        return UserError(f"{unreadable(address, reason)}, {way_out}")


class SampleRef(NamedTuple):
    """A sample of an open shard."""

    shard: OpenShard
    number: int  # of the sample in the shard


class Lane:
    """The endless sequence of samples of one lane. One shard is open, the next is being fetched.

    An unreadable shard is replaced by the lane's next readable one, from which as many samples are
    taken as were lost. Every later sample thus keeps its place, and a resumed run needs no record
    of bad shards.

    bad_shards: address and reason of each unreadable shard are added; a worker's lanes share it.
    """

    def __init__(self, source: DataSource, lane: int, bad_shards: dict[str, str]):
        self.source, self.lane, self.bad_shards = source, lane, bad_shards

    def samples(self, offset: int) -> Iterator[SampleRef]:
        """All samples from the lane's `offset`-th on, forever.

        Raises UserError where a shard is invalid, or more shards are unreadable than allowed.
        """
        source = self.source
        counts = [shard.samples for shard in source.manifest.shards]
        epoch, turn, offset = position(counts, source.seed, self.lane, source.lanes, offset)
        order = self._shards_from(epoch, turn)
        epoch, number = next(order)
        ahead = self._read_ahead(number)
        while True:
            following = next(order)
            opened, actual = self._open(number, ahead, epoch)
            ahead = self._read_ahead(following[1])
            try:
                # `actual` differs from `number` where another shard replaces it.
                indices = cycle(sample_order(source.seed, epoch, actual, len(opened)))
                for index in islice(indices, offset, counts[number]):
                    yield SampleRef(opened, index)
            except GeneratorExit:
                ahead.close()
                raise
            finally:
                opened.close()
            (epoch, number), offset = following, 0

    def _shards_from(self, epoch: int, turn: int) -> Iterator[tuple[int, int]]:
        """The lane's shards in reading order, forever: (epoch, number)."""
        source = self.source
        shards = len(source.manifest.shards)
        while True:
            mine = lane_shards(source.seed, epoch, self.lane, source.lanes, shards)
            yield from ((epoch, number) for number in mine[turn:])
            epoch, turn = epoch + 1, 0

    def _read_ahead(self, number: int) -> ReadAhead:
        source = self.source
        address = source.address(number)
        attempts = 1 if address in self.bad_shards else ATTEMPTS
        return ReadAhead(address, source.manifest.shards[number], source.fetch, attempts)

    def _open(self, number: int, ahead: ReadAhead, epoch: int) -> tuple[OpenShard, int]:
        """The shard, or the lane's next readable one, and its number."""
        source = self.source
        replacements = self._replacements(number, epoch)
        while True:
            try:
                file = ahead.result()
            except Unreadable as error:
                self._add_bad_shard(number, str(error))
                replacement = next(replacements, None)
                if replacement is None:
                    raise UserError(f"no shard of lane {self.lane} can be read") from None
                number = replacement
                ahead = self._read_ahead(number)
                continue
            shard = source.manifest.shards[number]
            return OpenShard(file, shard, source.manifest, source.address(number)), number

    def _replacements(self, number: int, epoch: int) -> Iterator[int]:
        """The shards after `number` in the lane, each once, until all shards have been tried."""
        seen = {number}
        order = self._shards_from(epoch, 0)
        next(other for _, other in order if other == number)
        for _, other in islice(order, 10 * len(self.source.manifest.shards)):
            if other not in seen:
                seen.add(other)
                yield other

    def _add_bad_shard(self, number: int, reason: str) -> None:
        address = self.source.address(number)
        self.bad_shards.setdefault(address, reason)
        if len(self.bad_shards) > self.source.max_bad_shards:
            raise self.source.too_many_bad_shards(address, reason)
