"""Which expert takes which token. Pure functions of scores: no collectives, no state.

Shape letters, in all of models/: B samples, T tokens per sample, S tokens in this rank's pool,
D width, E experts, e experts on this rank, K tokens per expert, H expert hidden width, N rows.
"""

from fractions import Fraction
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffmoe.models.precision import outside_autocast

Rounding = Literal["exact", "release"]
Gate = Literal["softmax", "sigmoid", "identity"]


class Assignment(NamedTuple):
    """Token-expert pairs grouped by expert; inside a group tokens stand in token order.

    Static (training, counts_E is None): token_index and gates are (E, K).
    Ragged (inference, wide pools): both are (N,), the E groups have lengths counts_E.
    apart: tokens (n,) that an expert of their own takes instead (ProMoE).
    """

    token_index: Tensor
    gates: Tensor
    counts_E: Tensor | None = None
    apart: Tensor | None = None


def expert_capacity(
    tokens: int, experts: int, capacity: float, rounding: Rounding = "exact"
) -> int:
    """K of Eq. 6: how many of `tokens` every expert takes, at least one if there are any.

    rounding: "exact" is the floor of S * C / E; "release" computes it in floats, as the paper's
    code does, which at times is one less (C = E = 7). tokens may be symbolic (torch.export).
    """
    if rounding == "exact":
        numerator, denominator = _ratio(capacity)
        k = tokens * numerator // (experts * denominator)
    else:
        k = int(tokens / experts * capacity)
    return torch.sym_min(tokens, torch.sym_max(1, k))


@torch.compiler.assume_constant_result
@cache
def _ratio(capacity: float) -> tuple[int, int]:
    """The fraction whose digits a float holds: 7/10 for 0.7, which is no float itself."""
    ratio = Fraction(capacity).limit_denominator(1_000_000)
    return ratio.numerator, ratio.denominator


def router_logits(tokens: Tensor, weight_ED: Tensor) -> Tensor:
    """A linear router's logits (..., E), in fp32 at least, whatever the tokens' type."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    with outside_autocast(tokens):
        return F.linear(tokens.to(dtype), weight_ED.to(dtype))


def router_scores(logits_SE: Tensor, gate: Gate) -> Tensor:
    """What experts select tokens by, and weigh their outputs by: one function of the logits.

    softmax: over experts (Eq. 4), about 1/E each. sigmoid: each expert by itself. identity: the
    logits (Expert Race, arXiv 2503.16057), which may be negative.
    """
    if gate == "softmax":
        return logits_SE.softmax(dim=-1)
    return logits_SE.sigmoid() if gate == "sigmoid" else logits_SE


def ranked(scores_SE: Tensor) -> Tensor:
    """The scores to choose by: without gradient, and NaN below all others.

    Every expert then finds its K whatever the scores are, and a sample that has become NaN takes no
    other sample's place.
    """
    scores_SE = scores_SE.detach()
    return torch.where(scores_SE.isnan(), -torch.inf, scores_SE)


def select_largest(values_XS: Tensor, kth_X: Tensor, ties_X: Tensor) -> Tensor:
    """Mask (X, S) of all values above the K-th largest, and of the first `ties_X` that equal it."""
    equal_XS = values_XS == kth_X[:, None]
    return (values_XS > kth_X[:, None]) | (equal_XS & (equal_XS.cumsum(dim=1) <= ties_X[:, None]))


def top_k_mask(values_XS: Tensor, k: int) -> Tensor:
    """Mask (X, S) of the k largest values of each row; equal values fall to the lower index."""
    if k == 0:  # a rank without tokens
        return torch.zeros_like(values_XS, dtype=torch.bool)
    kth_X = values_XS.topk(k, dim=1).values[:, -1]
    return select_largest(values_XS, kth_X, k - (values_XS > kth_X[:, None]).sum(dim=1))


def static_assignment(selected_ES: Tensor, gates_SE: Tensor, k: int) -> Assignment:
    """The pairs of a mask with exactly k tokens for every expert; does not wait for the device."""
    slot_ES = torch.where(selected_ES, selected_ES.cumsum(dim=1) - 1, k)
    token_ES = torch.arange(selected_ES.shape[1], device=selected_ES.device).expand_as(selected_ES)
    # All tokens that were not selected are written into a last column, which is cut off.
    index_EK = token_ES.new_zeros(selected_ES.shape[0], k + 1).scatter(1, slot_ES, token_ES)[:, :k]
    return Assignment(index_EK, gates_SE.t().gather(1, index_EK))


def ragged_assignment(
    selected_ES: Tensor, gates_SE: Tensor, pairs: int | None = None
) -> Assignment:
    """The pairs of any mask. pairs: how many it holds; unknown, this waits for the device."""
    if pairs is None:
        expert_N, token_N = selected_ES.nonzero(as_tuple=True)
    else:
        expert_N, token_N = selected_ES.nonzero_static(size=pairs).unbind(1)
    return Assignment(token_N, gates_SE[token_N, expert_N], selected_ES.sum(dim=1))


def gather(tokens_SD: Tensor, token_index: Tensor) -> Tensor:
    """The selected tokens, (*token_index.shape, D)."""
    # The backward of index_select adds whole rows; that of tokens_SD[index], single numbers.
    return tokens_SD.index_select(0, token_index.flatten()).unflatten(0, token_index.shape)


def combine(base_SD: Tensor, rows: Tensor, gates: Tensor, token_index: Tensor) -> Tensor:
    """base_SD plus every row times its gate, added at its token. rows: (*gates.shape, D)."""
    gated = rows * gates.unsqueeze(-1).to(rows.dtype)
    return base_SD.index_add(0, token_index.flatten(), gated.flatten(0, -2))


def expert_choice_mask(scores_SE: Tensor, tokens_per_sample: int, k: int) -> Tensor:
    """Every expert takes its best k tokens of each sample (EC-DiT). -> (E, S)."""
    scores_XT = scores_SE.t().reshape(-1, tokens_per_sample)
    return top_k_mask(scores_XT, k).view(scores_SE.shape[1], -1)


def token_choice_mask(scores_SE: Tensor, k: int) -> Tensor:
    """Every token takes its k best experts; equal scores fall to the lower expert. -> (E, S)."""
    # A stable sort, since topk leaves the order of equal scores open.
    best_Sk = scores_SE.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(scores_SE, dtype=torch.bool).scatter(1, best_Sk, True).t()


def counted_mask(scores_SE: Tensor, counts_E: Tensor) -> Tensor:
    """Expert i takes its counts_E[i] best tokens of the whole batch (Alg. 4). -> (E, S)."""
    order_ES = scores_SE.t().sort(dim=1, descending=True, stable=True).indices
    within_ES = torch.arange(order_ES.shape[1], device=order_ES.device) < counts_E[:, None]
    return torch.zeros_like(within_ES).scatter(1, order_ES, within_ES)


def load_balancing_loss(scores_SE: Tensor, selected_ES: Tensor) -> Tensor:
    """E times the sum over experts of (share of choices) x (mean score); 1 when balanced.

    The auxiliary loss of Switch Transformers (arXiv 2101.03961, Eq. 4), for token choice only.
    """
    share_E = selected_ES.sum(dim=1) / selected_ES.sum()
    return scores_SE.shape[1] * (share_E * scores_SE.mean(dim=0)).sum()


def z_loss(logits_SE: Tensor) -> Tensor:
    """Mean squared log of the sum over experts of e^logit (ST-MoE, arXiv 2202.08906, Eq. 5)."""
    return logits_SE.logsumexp(dim=-1).square().mean()
