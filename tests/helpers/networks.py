"""Networks without training, whose experts are neither idle nor always at work; MoE layers alone,
in every way to route, and the definition of what experts compute.
"""

import torch
from torch import Tensor, nn

from diffmoe.config import Config
from diffmoe.models.dit import DiT
from diffmoe.models.experts import Experts
from diffmoe.models.moe import MoEFeedForward
from diffmoe.parallel.topology import Topology
from tests.helpers.tiny import randomize, tiny_config

CONFIG = tiny_config()
DDPM = tiny_config(diffusion__objective="ddpm", model__learn_sigma=True)


def network_of(config: Config, topology: Topology | None = None) -> DiT:
    """In evaluation, with thresholds that about half of all token-expert pairs pass."""
    network = randomize(DiT(config.model, config.moe, topology))
    set_thresholds(network)
    return network.eval()


def set_thresholds(network: DiT) -> None:
    """Such that about half of all pairs of token and expert are wanted, where there are any."""
    for layer in network.thresholded_layers:
        layer.tracked.fill_(0.0 if network.moe_config.type == "race" else 0.5)


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
# Families whose gates are the softmax of a linear router, and all.
FAMILIES = ["diffmoe", "expert_choice", "token_choice"]
ALL_FAMILIES = [*FAMILIES, "race", "promoe", "dsmoe"]
# Every way in which tokens are routed: (moe.type, moe.inference, training mode).
WAYS = [
    *[(family, "per_token", True) for family in FAMILIES],
    *[("diffmoe", inference, False) for inference in INFERENCE],
    *[(family, "per_token", False) for family in FAMILIES[1:]],
]
ALL_WAYS = [
    *WAYS,
    *[("race", inference, False) for inference in INFERENCE],
    *[(family, "per_token", False) for family in ("promoe", "dsmoe")],
    *[(family, "per_token", True) for family in ("race", "promoe", "dsmoe")],
]


WIDTH = 16


def tiny_layer(way: tuple[str, str, bool] = WAYS[0], **changes) -> MoEFeedForward:
    """One MoE layer of width 16, with thresholds at which about half of the pairs are wanted."""
    family, inference, training = way
    config = tiny_config(moe__type=family, moe__inference=inference, **changes)
    network = randomize(DiT(config.model, config.moe))
    set_thresholds(network)
    return network.moe_layers[0].train(training)


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
