"""Where a parameter group's matrices lie in ZeRO's flat partitions, and how cut ones come together.

Partition r holds elements [r n, (r + 1) n) of the group's flattened parameters, so its ends may cut
a matrix. The rank where such a matrix begins owns it: that is at most one per rank.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from diffmoe.parallel.orthogonalize import Matrices


class CutMatrix(NamedTuple):
    """A matrix that begins on rank `first`, with `parts` elements on that and the next ranks."""

    first: int
    parts: list[int]
    matrix: Matrices


def cut_matrices(spans: Iterable[tuple[int, Matrices]], partition: int) -> Iterator[CutMatrix]:
    """spans: where in the flattened group each matrix begins. partition: elements of a rank's."""
    for start, one in spans:
        end = start + one.size
        first, last = start // partition, (end - 1) // partition
        if first < last:
            inner = [partition] * (last - first - 1)
            parts = [(first + 1) * partition - start, *inner, end - last * partition]
            yield CutMatrix(first, parts, one)


def spans_of(stack: Matrices, start: int) -> list[tuple[int, Matrices]]:
    """Where each matrix of a stack begins. start: where the first one does."""
    return [(start + number * stack.size, stack) for number in range(stack.number)]


class Cut(NamedTuple):
    """A rank's part in the matrices that partitions' ends cut.

    head: elements at its partition's start, of a matrix that begins before it. tail: elements at
    its end, of the matrix `owned`. sends, receives: elements to and from each rank.
    """

    head: int
    tail: int
    sends: list[int]
    receives: list[int]
    owned: Matrices | None

    @classmethod
    def of(
        cls, spans: Iterable[tuple[int, Matrices]], partition: int, ranks: int, rank: int
    ) -> "Cut | None":
        """spans: where each matrix begins, and it. None where no rank's partition cuts one."""
        heads, owners, tails = [0] * ranks, [0] * ranks, [0] * ranks
        owned: dict[int, Matrices] = {}
        for one in cut_matrices(spans, partition):
            owned[one.first], tails[one.first] = one.matrix, one.parts[0]
            for other, part in enumerate(one.parts[1:], one.first + 1):
                owners[other], heads[other] = one.first, part
        if not owned:
            return None
        sends = [0] * ranks
        sends[owners[rank]] = heads[rank]
        sends[rank] = tails[rank]
        receives = [heads[r] if owners[r] == rank else 0 for r in range(ranks)]
        receives[rank] = tails[rank]
        return cls(heads[rank], tails[rank], sends, receives, owned.get(rank))

    def gather(self, flat: Tensor, group: dist.ProcessGroup, device: torch.device) -> Tensor:
        """The elements of the owned matrix on `device`, none if there is none.

        flat: of this partition.
        """
        own = torch.cat([flat[: self.head], flat[len(flat) - self.tail :]]).to(device)
        whole = own.new_empty(sum(self.receives))
        dist.all_to_all_single(whole, own, self.receives, self.sends, group)
        return whole

    def scatter(self, whole: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        """Back to where `gather` took it from: (head, tail) of this partition."""
        own = whole.new_empty(self.head + self.tail)
        dist.all_to_all_single(own, whole, self.sends, self.receives, group)
        return own[: self.head], own[self.head :]


class MatrixLayout(NamedTuple):
    """What one rank has of a group's matrices.

    whole: stacks that lie in its partition, and where they begin in it. cut: None if no rank has a
    part of a matrix. device: of the network, which offloaded partitions are not on.
    """

    whole: list[tuple[int, Matrices]]
    cut: Cut | None
    group: dist.ProcessGroup
    device: torch.device

    @classmethod
    def of(cls, zero: Any, index: int, stacks: list[Matrices]) -> "MatrixLayout":
        """zero: DeepSpeed's optimizer. stacks: of its parameter group `index`, in order."""
        flat, group = zero.bit16_groups_flat[index], zero.real_dp_process_group[index]
        partition, rank = int(zero.partition_size[index]), dist.get_rank(group)
        begin, end = rank * partition, (rank + 1) * partition
        whole, spans = [], []
        for parameter, stack in zip(zero.bit16_groups[index], stacks, strict=True):
            start = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
            places = spans_of(stack, start)
            spans += places
            inside = [at for at, _ in places if begin <= at and at + stack.size <= end]
            if inside:
                whole.append((inside[0] - begin, stack._replace(number=len(inside))))
        cut = Cut.of(spans, partition, dist.get_world_size(group), rank)
        return cls(whole, cut, group, flat.device)
