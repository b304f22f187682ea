"""MoE layers alone: every way to route, and the definition of what experts compute."""

import torch
from torch import Tensor, nn

from diffmoe.models.dit import DiT
from diffmoe.models.experts import Experts
from diffmoe.models.moe import MoEFeedForward
from tests.helpers.tiny import randomize, tiny_config


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
