"""Routing health: numbers that tell early whether experts pay, and which mean trouble."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.models.experts import Experts

# An expert is called dead if its load is below this share of the mean.
DEAD = 0.01
# Samples are cut by their times into at most so many groups.
_TIME_GROUPS = 8


def time_share(selected_ES: Tensor, t_B: Tensor) -> Tensor:
    """Share of the selection's variance between groups of samples of similar times, a scalar.

    0: the timestep says nothing about who takes a token; 1: everything. nan below four samples.
    """
    samples = len(t_B)
    groups = min(_TIME_GROUPS, samples // 2)
    if groups < 2:
        return selected_ES.new_full((), math.nan, dtype=torch.double)
    selected_EBT = selected_ES.unflatten(1, (samples, -1)).double()
    mean_E = selected_EBT.mean(dim=(1, 2))
    total = (selected_EBT - mean_E[:, None, None]).square().sum()
    between = torch.zeros_like(total)
    for group in t_B.argsort().tensor_split(groups):
        tokens = selected_EBT[:, group].flatten(1)
        between = between + tokens.shape[1] * (tokens.mean(dim=1) - mean_E).square().sum()
    return between / total.clamp(min=1e-12)


def load_entropy(load_LE: Tensor) -> Tensor:
    """Entropy of each layer's load over that of an even one, (L,): 1 is balanced, 0 all on one.

    A single expert is balanced.
    """
    experts = load_LE.shape[1]
    if experts == 1:
        return torch.ones_like(load_LE[:, 0])
    share_LE = load_LE / load_LE.sum(dim=1, keepdim=True).clamp(min=1e-12)
    entropy_L = -torch.special.xlogy(share_LE, share_LE).sum(dim=1)
    return entropy_L / math.log(experts)


def dead_experts(load_LE: Tensor) -> Tensor:
    """How many experts of each layer have less than 1 % of the mean load, (L,)."""
    return (load_LE < DEAD * load_LE.mean(dim=1, keepdim=True)).sum(dim=1)


@torch.no_grad()
def weight_similarity(experts: Experts) -> Tensor:
    """Mean cosine between the first matrices of this rank's experts; nan of a single one."""
    first = experts.w_gate if experts.activation == "swiglu" else experts.w_in
    return _mean_cosine(first.flatten(1)[:, None])


@torch.no_grad()
def output_similarity(experts: Experts, tokens_ND: Tensor) -> Tensor:
    """Mean cosine between what this rank's experts make of the same tokens; nan of a single one."""
    first = experts.w_out
    rows = tokens_ND.to(first.dtype).expand(len(first), -1, -1)
    return _mean_cosine(experts(rows, None))


def _mean_cosine(vectors_eNX: Tensor) -> Tensor:
    """Over pairs of e and over N."""
    e = len(vectors_eNX)
    if e < 2:
        return vectors_eNX.new_full((), math.nan, dtype=torch.double)
    unit_eNX = F.normalize(vectors_eNX.float(), dim=-1)
    # The squared norm of a sum of unit vectors counts every pair twice, and each with itself.
    total_N = unit_eNX.sum(dim=0).square().sum(dim=-1)
    return ((total_N - e) / (e * (e - 1))).mean().double()


class Trouble(NamedTuple):
    """A number that is known to mean trouble beyond a limit.

    metric: its name in metrics.jsonl, a list over MoE layers. above: whether that is beyond.
    """

    metric: str
    limit: float
    above: bool
    meaning: str

    def told(self, values_L: Sequence[float]) -> str | None:
        """Which layers are beyond the limit, and what that means; None if none is."""
        beyond = [
            layer
            for layer, value in enumerate(values_L)
            if (value > self.limit if self.above else value < self.limit)
        ]
        if not beyond:
            return None
        worst = (max if self.above else min)(values_L[layer] for layer in beyond)
        where = ", ".join(map(str, beyond))
        told = self.meaning.format(value=worst)
        return f"MoE layer {where} of {len(values_L)} (from 0), {self.metric}: {told}"


TROUBLES = (
    Trouble(
        "gate_sum",
        0.15,  # trained mixtures that beat their dense twin had 0.2 to 0.3
        False,
        "the gates of a token sum to {value:.2g}, where a dense MLP counts 1, so experts hardly "
        "count and hardly learn. Softmax gates are about 1/E (Expert Race, arXiv 2503.16057: FID "
        "16.5 with them, 13.7 with the logits as gates): take moe.gate=identity or a larger "
        "moe.gate_scale",
    ),
    Trouble(
        "time_share",
        0.5,
        True,
        "the timestep alone explains {value:.0%} of who takes which token: the router sorts by "
        "noise instead of content (Nucleus-Image, arXiv 2604.12163): set "
        "moe.router_input=plain_with_time",
    ),
    Trouble(
        "unselected_share",
        0.6,
        True,
        "no expert takes {value:.0%} of the tokens (chance alone leaves 37 % at C = 1), which pass "
        "unchanged: raise moe.capacity, or give a shared expert (moe.shared_expert_ratio)",
    ),
    Trouble(
        "dead_experts",
        0,
        True,
        "{value:g} of the experts get less than 1 % of the mean load at inference: they cost "
        "memory and learn next to nothing (Switch, arXiv 2101.03961): balance them "
        "(moe.aux_loss_weight, moe.balance_rate), or take fewer",
    ),
    Trouble(
        "load_entropy",
        0.6,
        False,
        "few experts have most of the load (entropy {value:.2f} of an even one's; Expert Race "
        "without a balancing loss had 7 times the mean on one, and lost 0.6 FID): balance it",
    ),
    Trouble(
        "expert_output_similarity",
        0.9,
        True,
        "experts make nearly the same of a token (cosine {value:.2f}): they are copies that "
        "nothing tells apart (arXiv 2605.19378): start them with noise",
    ),
)
