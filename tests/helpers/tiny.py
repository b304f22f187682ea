"""Small configurations, networks and MoE layers, with weights in which no zero hides an error."""

import pytest
import torch
from torch import Tensor, nn

from diffmoe.conditions import Text
from diffmoe.config import Config, TextConfig
from diffmoe.data.stream import Batch
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.experts import Experts
from diffmoe.models.moe import MoEFeedForward
from diffmoe.parallel.topology import Topology
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
    shape = (n, model.in_channels, model.input_size, model.input_size)
    generators = [keyed_generator("test batch", step, lane) for lane in lanes]
    return Batch(
        torch.cat([torch.randn(shape, generator=g) for g in generators]),
        torch.cat([torch.randint(model.num_classes, (n,), generator=g) for g in generators]),
        model.text and tree_cat([random_text(model.text, n, g) for g in generators]),
    )


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


CONFIG = tiny_config()
DDPM = tiny_config(diffusion__objective="ddpm", model__learn_sigma=True)


def network_of(config: Config, topology: Topology | None = None) -> DiT:
    """In evaluation, with thresholds that about half of all token-expert pairs pass."""
    network = randomize(DiT(config.model, config.moe, topology))
    for layer in network.moe_layers:
        if layer.capacity_predictor is not None:
            layer.capacity_predictor.thresholds.fill_(0.5)
    return network.eval()


def one_after_the_other(experts: Experts, rows: Tensor, counts: list[int]) -> Tensor:
    """The definition: each expert's MLP on its rows."""
    outputs = []
    for i, group in enumerate(rows.split(counts)):
        if experts.activation == "swiglu":
            hidden = nn.functional.silu(group @ experts.w_gate[i]) * (group @ experts.w_up[i])
            outputs.append(hidden @ experts.w_out[i])
        else:
            hidden = group @ experts.w_in[i] + experts.b_in[i]
            hidden = nn.functional.gelu(hidden, approximate="tanh")
            outputs.append(hidden @ experts.w_out[i] + experts.b_out[i])
    return torch.cat(outputs)


INFERENCE = ["per_token", "pooled", "static"]
FAMILIES = ["diffmoe", "expert_choice", "token_choice"]
# Every way in which tokens are routed: (moe.type, moe.inference, training mode).
WAYS = [
    *[(family, "per_token", True) for family in FAMILIES],
    *[("diffmoe", inference, False) for inference in INFERENCE],
    *[(family, "per_token", False) for family in FAMILIES[1:]],
]


WIDTH = 16


def tiny_layer(way: tuple[str, str, bool] = WAYS[0], **changes) -> MoEFeedForward:
    """One MoE layer of width 16, with thresholds at which about half of the pairs are wanted."""
    family, inference, training = way
    config = tiny_config(moe__type=family, moe__inference=inference, **changes)
    layer = randomize(DiT(config.model, config.moe)).moe_layers[0].train(training)
    if layer.capacity_predictor is not None:
        layer.capacity_predictor.thresholds.fill_(0.5)
    return layer


def tokens(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))
    return drawn.requires_grad_()


def examples(samples: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, t, labels for the tiny network: 16 tokens per sample."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(samples, 2, 8, 8, generator=generator),
        torch.rand(samples, generator=generator),
        torch.randint(6, (samples,), generator=generator),
    )


def random_scores(tokens: int, experts: int, levels: int = 0) -> Tensor:
    """Softmax-like scores; with `levels` they take that many values only, so that many tie."""
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(tokens + experts))
    return (scores * levels).floor() / levels if levels else scores


def refusal(*overrides: str, name: str = "mnist") -> str:
    """What the user reads when these overrides are refused."""
    with pytest.raises(UserError) as caught:
        load_config(name, overrides)
    return str(caught.value)
