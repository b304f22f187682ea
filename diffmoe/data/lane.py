"""One lane of the data: its shards in order, one open and the next being fetched."""

from collections.abc import Iterator
from itertools import cycle, islice
from typing import TYPE_CHECKING, NamedTuple

from diffmoe.data.fetching import ATTEMPTS, ReadAhead, Unreadable
from diffmoe.data.lanes import lane_shards, position, sample_order
from diffmoe.data.reading import OpenShard
from diffmoe.errors import UserError

if TYPE_CHECKING:
    from diffmoe.data.stream import LatentStream


class SampleRef(NamedTuple):
    """Where a sample lies."""

    shard: OpenShard
    index: int


class Lane:
    """One lane's endless stream of samples. Has one shard open and opens the next meanwhile.

    A shard that cannot be had is replaced by the lane's next one, from which as many samples are
    taken as were lost. So every later sample keeps its place in the stream, and a resume needs to
    know nothing of it.

    bad_shards: filled with address and reason of each such shard; the lanes of a worker share it.
    """

    def __init__(self, stream: "LatentStream", lane: int, bad_shards: dict[str, str]):
        self.stream, self.lane, self.bad_shards = stream, lane, bad_shards

    def spots(self, offset: int) -> Iterator[SampleRef]:
        """All samples from the lane's `offset`-th on, forever."""
        stream, shards = self.stream, self.stream.manifest.shards
        counts = [shard.samples for shard in shards]
        epoch, turn, offset = position(counts, stream.seed, self.lane, stream.lanes, offset)
        order = self._shards_from(epoch, turn)
        epoch, number = next(order)
        ahead = self._read_ahead(number)
        while True:
            following = next(order)
            opened, held = self._open(number, ahead, epoch)
            ahead = self._read_ahead(following[1])
            try:
                # `held` is `number`, unless another shard stands in for it.
                indices = cycle(sample_order(stream.seed, epoch, held, len(opened)))
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
        stream = self.stream
        shards = len(stream.manifest.shards)
        while True:
            mine = lane_shards(stream.seed, epoch, self.lane, stream.lanes, shards)
            yield from ((epoch, number) for number in mine[turn:])
            epoch, turn = epoch + 1, 0

    def _read_ahead(self, number: int) -> ReadAhead:
        stream = self.stream
        address = self._address(number)
        attempts = 1 if address in self.bad_shards else ATTEMPTS
        return ReadAhead(address, stream.manifest.shards[number], stream.fetch, attempts)

    def _open(self, number: int, ahead: ReadAhead, epoch: int) -> tuple[OpenShard, int]:
        """The shard, or the first of the lane's next ones that can be had, and its number."""
        manifest = self.stream.manifest
        candidates = self._candidates(number, epoch)
        while True:
            try:
                file = ahead.result()
            except Unreadable as error:
                self._lose(number, str(error))
                number = next(candidates, None)
                if number is None:
                    raise UserError(f"no shard of lane {self.lane} can be read") from None
                ahead = self._read_ahead(number)
                continue
            return OpenShard(file, manifest.shards[number], manifest, self._address(number)), number

    def _candidates(self, number: int, epoch: int) -> Iterator[int]:
        """The shards after `number` in the lane, each once, till all shards had their turn."""
        seen = {number}
        order = self._shards_from(epoch, 0)
        next(other for _, other in order if other == number)
        for _, other in islice(order, 10 * len(self.stream.manifest.shards)):
            if other not in seen:
                seen.add(other)
                yield other

    def _lose(self, number: int, reason: str) -> None:
        self.bad_shards.setdefault(self._address(number), reason)
        if len(self.bad_shards) > self.stream.max_bad_shards:
            raise self.stream.too_many(self._address(number), reason)

    def _address(self, number: int) -> str:
        manifest = self.stream.manifest
        return manifest.address(self.stream.directory, manifest.shards[number])
