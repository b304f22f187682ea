"""MoE layers of the newer families, in float64, and what their routers compute."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.models.dit import DiT
from tests.helpers.networks import WIDTH
from tests.helpers.tiny import randomize, tiny_config

EXPERTS = 4


def network_of(family: str, scale: float = 0.5, **changes) -> DiT:
    config = tiny_config(moe__type=family, **changes)
    return randomize(DiT(config.model, config.moe), scale=scale)


def layer_of(family: str, **changes) -> Any:
    return network_of(family, **changes).moe_layers[0].double()


def tokens(samples: int = 3, per_sample: int = 10, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, per_sample, WIDTH, generator=generator, dtype=torch.float64)


def hidden(layer: Any, flat: Tensor) -> Tensor:
    linear = layer.router_hidden
    return F.gelu(flat @ linear.weight.t() + linear.bias, approximate="tanh")
