"""A network small enough for many tests, with weights in which no zero hides an error."""

import pytest
import torch
from torch import Tensor

from diffmoe.conditions import Text
from diffmoe.config import Config, TextConfig
from diffmoe.data.stream import Batch
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.recipes import load_config
from diffmoe.seeding import keyed_generator
from diffmoe.tree import tree_cat

BYTES = {"encoder": "bytes", "length": 6, "width": 8, "depth": 1}
FROZEN = {"encoder": "frozen", "length": 6, "width": 8, "pooled": 4}
WITHOUT_POOLED = {**FROZEN, "pooled": 0}


def tiny_config(**changes) -> Config:
    """changes: dotted keys with '__' for the dot, e.g. moe__activation="swiglu"."""
    base = Config.model_validate(
        {
            "model": {
                "input_size": 8,
                "in_channels": 2,
                "width": 16,
                "depth": 4,
                "heads": 2,
                "num_classes": 5,
            },
            "moe": {"experts": 4},
            "data": {"lanes": 4, "workers": 0},
            "training": {"batch_size": 8},
            "logging": {"wandb": False},
        }
    )
    return base.replace({key.replace("__", "."): value for key, value in changes.items()})


def refusal(*overrides: str, name: str = "mnist") -> str:
    """What the user reads when these overrides are refused."""
    with pytest.raises(UserError) as caught:
        load_config(name, overrides)
    return str(caught.value)


@torch.no_grad()
def randomize(network: DiT, seed: int = 0, scale: float = 0.15) -> DiT:
    """Fill every parameter with noise that depends on its name and global expert alone."""
    experts = network.expert_parameters()
    for name, parameter in network.named_parameters():
        if name not in experts:
            parameter.copy_(_noise(parameter, scale, seed, name))
            continue
        first = network.topology.expert_rank * len(parameter)
        for offset, one in enumerate(parameter):
            one.copy_(_noise(one, scale, seed, name, first + offset))
    return network


def _noise(like: Tensor, scale: float, *key: int | str) -> Tensor:
    return torch.randn(like.shape, generator=keyed_generator("test", *key)) * scale


def random_batch(config: Config, step: int, lanes: range) -> Batch:
    """What the lanes of one rank could give at a step."""
    n, model = config.samples_per_lane, config.model
    shape = (n, *model.latent_shape)
    generators = [keyed_generator("test batch", step, lane) for lane in lanes]
    return Batch(
        torch.cat([torch.randn(shape, generator=g) for g in generators]),
        torch.cat([torch.randint(model.num_classes, (n,), generator=g) for g in generators]),
        model.text and tree_cat([random_text(model.text, n, g) for g in generators]),
        _random_features(config, n, generators),
    )


def _random_features(config: Config, samples: int, generators: list) -> Tensor | None:
    """On a grid of 3x5, which is not that of the tokens."""
    if config.align.block is None:
        return None
    shape = (samples, config.align.width, 3, 5)
    return torch.cat([torch.randn(shape, generator=g) for g in generators]).half()


def random_text(text: TextConfig, samples: int, generator: torch.Generator) -> Text:
    """Captions of one token and more; what lies behind them is no zero."""
    lengths = torch.randint(1, text.length + 1, (samples, 1), generator=generator)
    places = (samples, text.length)
    if text.encoder == "bytes":
        tokens = torch.randint(256, places, generator=generator)
    else:
        tokens = torch.randn(*places, text.width, generator=generator)
    pooled = torch.randn(samples, text.pooled, generator=generator) if text.pooled else None
    return Text(tokens, torch.arange(text.length) < lengths, pooled)
