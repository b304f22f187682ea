"""Operations on named tuples of tensors, which may hold further ones, and None."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def tree_map(function: Callable[[Tensor], Tensor], value: T) -> T:
    """The same tuple (or tensor) with every tensor replaced by `function` of it."""
    tree: Any = value
    if isinstance(tree, Tensor):
        return function(tree)  # type: ignore[return-value]
    if tree is None:
        return tree  # type: ignore[return-value]
    return type(tree)(*(tree_map(function, part) for part in tree))


def tree_cat(values: Sequence[T]) -> T:
    """Several tuples (or tensors) of one structure as one: tensors concatenated along axis 0."""
    trees: Sequence[Any] = values
    first = trees[0]
    if isinstance(first, Tensor):
        joined = first if len(trees) == 1 else torch.cat(tuple(trees))
        return joined  # type: ignore[return-value]
    if first is None:
        return first  # type: ignore[return-value]
    return type(first)(*(tree_cat(column) for column in zip(*trees, strict=True)))
