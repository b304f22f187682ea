"""How parameters start: each module says it for its own.

A module's parameters start as is usual for its type (`_BY_TYPE`), or as the module or its parent
says in `module.initializers`, a dict from the parameter's name to an initializer.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

# (shape, generator) -> initial values in fp32.
Initializer = Callable[[torch.Size, torch.Generator], Tensor]
Module = TypeVar("Module", bound=nn.Module)


def zeros(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def ones(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.ones(shape)


def normal(std: float) -> Initializer:
    """Normally distributed around 0."""
    return partial(_normal, std)


def _normal(std: float, shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32) * std


def xavier_uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Uniform in +-(6 / (rows + columns))^(1/2) (Glorot and Bengio, 2010), of a matrix (out, in).

    A convolution's weight (out, in, height, width) is a matrix with in * height * width columns.
    Of a transposed matrix the bound is the same.
    """
    bound = (6 / (shape[0] + shape[1:].numel())) ** 0.5
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1) * bound


_BY_TYPE: dict[type[nn.Module], dict[str, Initializer]] = {
    nn.Linear: {"weight": xavier_uniform, "bias": zeros},
    nn.Conv2d: {"weight": xavier_uniform, "bias": zeros},
    nn.RMSNorm: {"weight": ones},
}


def starting(module: Module, **initializers: Initializer) -> Module:
    """The module itself; its parameters of these names will start so.

    Set by a parent for parts whose place in the network decides how they start.
    """
    module.initializers = dict(initializers)  # type: ignore[assignment]  # not a module
    return module


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer that starts with zeros."""
    return starting(nn.Linear(inputs, outputs), weight=zeros)


def initializers_of(network: nn.Module) -> dict[str, Initializer]:
    """The initializer of each parameter, by the parameter's full name.

    Raises TypeError naming a parameter for which no module says how it starts.
    """
    found: dict[str, Initializer] = {}
    for prefix, module in network.named_modules():
        own: Mapping[str, Initializer] = {
            **_BY_TYPE.get(type(module), {}),
            **getattr(module, "initializers", {}),
        }
        for name, _ in module.named_parameters(recurse=False):
            if name not in own:
                kind = type(module).__name__
                raise TypeError(f"{kind} does not say how its parameter {name} starts")
            found[f"{prefix}.{name}" if prefix else name] = own[name]
    return found
