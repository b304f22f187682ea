"""Named tuples of tensors, treated as one: they may hold further ones, and None."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def tree_map(function: Callable[[Tensor], Tensor], value: T) -> T:
    """The same tuple (or tensor) with `function` of every tensor in the tensor's place."""
    if isinstance(value, Tensor):
        return function(value)
    return None if value is None else type(value)(*(tree_map(function, part) for part in value))


def tree_cat(values: Sequence[T]) -> T:
    """One tuple (or tensor) out of several alike, each tensor concatenated along its first axis."""
    first = values[0]
    if isinstance(first, Tensor):
        return first if len(values) == 1 else torch.cat(tuple(values))
    if first is None:
        return None
    return type(first)(*(tree_cat(column) for column in zip(*values, strict=True)))
