"""Another project's names for the tensors of a network, from ours and back.

A layout lists for each of our tensors which of theirs it is made of. The same table is used to read
their files, to check every name and shape in them, and to write them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.export.tensors import Shapes


class Parts(NamedTuple):
    """Their tensors that make up one of ours. join and split are inverses of each other."""

    names: list[str]
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]


Layout = dict[str, Parts]


def same(name: str) -> Parts:
    """The same tensor under another name."""
    return Parts([name], lambda parts: parts[0], lambda tensor: [tensor])


def stacked(names: list[str], transposed: bool) -> Parts:
    """One of their tensors per index of dimension 0. transposed: theirs are (out, in), ours not."""

    def turn(tensor: Tensor) -> Tensor:
        return tensor.t() if transposed else tensor

    return Parts(
        names,
        lambda parts: torch.stack([turn(part) for part in parts]),
        lambda tensor: [turn(one) for one in tensor],
    )


def without_last_row(name: str) -> Parts:
    """Ours has one more row, which is zero."""
    return Parts(
        [name],
        lambda parts: torch.cat([parts[0], torch.zeros_like(parts[0][:1])]),
        lambda tensor: [tensor[:-1]],
    )


def concatenated(names: list[str]) -> Parts:
    """Their tensors, of equal size, concatenated along dimension 0."""
    return Parts(names, torch.cat, lambda tensor: list(tensor.chunk(len(names))))


def repeated(names: list[str], why: str) -> Parts:
    """One tensor that they store several times. why: explains an error if the copies differ."""

    def first(parts: list[Tensor]) -> Tensor:
        for name, part in zip(names, parts, strict=True):
            if not torch.equal(part, parts[0]):
                raise UserError(f"{name} differs from {names[0]}: {why}")
        return parts[0]

    return Parts(names, first, lambda tensor: [tensor] * len(names))


def padded(parts: Parts, ours: int, theirs: int) -> Parts:
    """Ours has `ours` rows, theirs `theirs`: zeros lie between the last row and those before it."""

    def cut(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[: ours - 1], tensor[-1:]])

    def pad(tensor: Tensor) -> Tensor:
        zeros = tensor.new_zeros(theirs - ours, *tensor.shape[1:])
        return torch.cat([tensor[:-1], zeros, tensor[-1:]])

    return Parts(
        parts.names,
        lambda found: cut(parts.join(found)),
        lambda tensor: [pad(part) for part in parts.split(tensor)],
    )


def foreign_shapes(layout: Layout, ours: Shapes) -> Shapes:
    """The shapes of their tensors, by their names. ours: those of our tensors."""
    return {
        name: tuple(part.shape)
        for own, parts in layout.items()
        for name, part in zip(
            parts.names, parts.split(torch.empty(ours[own], device="meta")), strict=True
        )
    }


def check_foreign_state_dict(found: Shapes, layout: Layout, ours: Shapes, where: str) -> None:
    """Check that their file has the tensors of the layout in their shapes, and no other.

    where: names the file in errors. Raises UserError naming, by their names, the first tensors that
    are missing, unexpected or of another shape.
    """
    expected = foreign_shapes(layout, ours)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    problems += [
        f"{name} has the shape {found[name]}, not {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{where}: {'; '.join(problems[:3])}{more}")


def reader(layout: Layout, get: Callable[[str], Tensor], where: str) -> Callable[[str], Tensor]:
    """A function that gives our tensors, in fp32. get: gives theirs. where: for errors."""

    def read(name: str) -> Tensor:
        parts = layout[name]
        try:
            return parts.join([get(part) for part in parts.names]).float()
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    return read


def translated(layout: Layout, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Their state dict, made from our tensors. Holds the whole network in memory."""
    state: dict[str, Tensor] = {}
    for own, parts in layout.items():
        for name, part in zip(parts.names, parts.split(read(own)), strict=True):
            state[name] = part.contiguous().clone()
    return state
