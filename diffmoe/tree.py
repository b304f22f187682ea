"""Operations on named tuples of tensors, which may hold further ones, and None."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def tree_map(function: Callable[[Tensor], Tensor], value: T) -> T:
    """The same tuple (or tensor) with every tensor replaced by `function` of it."""
    tree: Any = value
    if tree is not None:
        is_leaf = isinstance(tree, Tensor)
        tree = function(tree) if is_leaf else type(tree)(*(tree_map(function, x) for x in tree))
    return tree


def tree_cat(values: Sequence[T]) -> T:
    """Several tuples (or tensors) of one structure as one: tensors concatenated along axis 0."""
    trees: Sequence[Any] = values
    joined = trees[0]
    if len(trees) > 1 and joined is not None:
        if isinstance(joined, Tensor):
            joined = torch.cat(tuple(trees))
        else:
            joined = type(joined)(*(tree_cat(column) for column in zip(*trees, strict=True)))
    return joined
