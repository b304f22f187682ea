"""Another project's names for the tensors of a network, from ours and back.

A layout says for each of our tensors which of theirs it is made of. The same table reads their
files, accounts for every name and shape in them, and writes them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.export.tensors import Shapes


class Parts(NamedTuple):
    """Their tensors that make up one of ours. join and split are inverse to each other."""

    names: list[str]
    join: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]


Layout = dict[str, Parts]


def same(name: str) -> Parts:
    """The tensor as it is."""
    return Parts([name], lambda parts: parts[0], lambda tensor: [tensor])


def stacked(names: list[str], transposed: bool) -> Parts:
    """One of theirs per row of dimension 0. transposed: theirs are (out, in), ours (in, out)."""

    def turn(tensor: Tensor) -> Tensor:
        return tensor.t() if transposed else tensor

    return Parts(
        names,
        lambda parts: torch.stack([turn(part) for part in parts]),
        lambda tensor: [turn(one) for one in tensor],
    )


def without_last_row(name: str) -> Parts:
    """Ours has a row more, of zeros."""
    return Parts(
        [name],
        lambda parts: torch.cat([parts[0], torch.zeros_like(parts[0][:1])]),
        lambda tensor: [tensor[:-1]],
    )


def concatenated(names: list[str]) -> Parts:
    """Equal shares of dimension 0."""
    return Parts(names, torch.cat, lambda tensor: list(tensor.chunk(len(names))))


def repeated(names: list[str], why: str) -> Parts:
    """One tensor that they keep several times. why: what is wrong if those differ."""

    def first(parts: list[Tensor]) -> Tensor:
        for name, part in zip(names, parts, strict=True):
            if not torch.equal(part, parts[0]):
                raise UserError(f"{name} differs from {names[0]}: {why}")
        return parts[0]

    return Parts(names, first, lambda tensor: [tensor] * len(names))


def their_shapes(layout: Layout, ours: Shapes) -> Shapes:
    """Shapes under their names."""
    return {
        name: tuple(part.shape)
        for own, parts in layout.items()
        for name, part in zip(
            parts.names, parts.split(torch.empty(ours[own], device="meta")), strict=True
        )
    }


def check_their_state_dict(found: Shapes, layout: Layout, ours: Shapes, where: str) -> None:
    """See that their file has what the layout needs and nothing else, told in their names.

    Raises UserError naming the first tensors that are missing, left over or of another shape.
    """
    expected = their_shapes(layout, ours)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is left over" for name in found if name not in expected]
    problems += [
        f"{name} has the shape {found[name]}, not {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{where}: {'; '.join(problems[:3])}{more}")


def reader(layout: Layout, get: Callable[[str], Tensor], where: str) -> Callable[[str], Tensor]:
    """Gives our tensors, in fp32, from theirs. where: names the file in errors."""

    def read(name: str) -> Tensor:
        parts = layout[name]
        theirs = [get(their_name) for their_name in parts.names]
        try:
            return parts.join(theirs).float()
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    return read


def translated(layout: Layout, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """Their state dict from our tensors: the whole network, once."""
    state: dict[str, Tensor] = {}
    for own, parts in layout.items():
        for name, part in zip(parts.names, parts.split(read(own)), strict=True):
            state[name] = part.contiguous().clone()
    return state
