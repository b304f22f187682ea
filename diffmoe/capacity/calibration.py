"""Thresholds that meet a wanted capacity (Eq. 14 and 16): quantiles of what the predictor says.

All in log odds: the predictor is sure of many tokens, and their probabilities all round to 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.capacity.forward import Forward, Observer
from diffmoe.capacity.meter import CapacityMeter
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.routing_mode import RoutingMode, check_capacity
from diffmoe.seeding import keyed_generator

# Of each expert, at most so many predictions are kept: the error of a quantile is far below 1 %.
BUDGET = 400_000
EVERY_TOKEN = -1e9  # a logit below all
# Thresholds of a layer change the tokens of the layers behind it, so quantiles are taken again.
ROUNDS = 12


class Passes(NamedTuple):
    """Forward passes to calibrate on. run: does them all, showing each to the observer."""

    count: int
    run: Callable[[Observer], None]


@torch.inference_mode()
def calibrate(
    network: DiT,
    capacity: float,
    passes: Passes,
    *,
    common: bool = False,
    tolerance: float = 0.01,
    report: Callable[[str], None] | None = None,
) -> tuple[Tensor, float]:
    """Route per token by thresholds with which C_avg over the passes is `capacity`.

    Returns the thresholds (L, E) as log odds, and C_avg.

    common: one threshold for all experts and layers, else each expert takes its share C / E.
    Raises UserError if C_avg is not within `tolerance` (relative) in the end, as when too many
    predictions are equal.
    """
    experts = network.moe_config.experts
    if not network.has_thresholds:
        raise UserError(
            f"a {network.moe_config.type} model has no capacity predictor, nothing to calibrate"
        )
    check_capacity(capacity, experts)
    aim, measured = capacity, float("nan")
    log_odds_LE = None
    network.routing = RoutingMode()  # the first round goes by the thresholds of training
    for turn in range(ROUNDS + 1):
        meter, kept = CapacityMeter(), _Logits(max(1, BUDGET // passes.count))

        def observe(forward: Forward, meter=meter, kept=kept) -> None:
            meter(forward)
            kept(forward)

        passes.run(observe)
        measured = meter.read().average
        if report is not None:
            report(f"round {turn}: capacity {measured:.4f}, wanted {capacity:g}")
        if turn and abs(measured / capacity - 1) <= tolerance:
            return log_odds_LE, measured
        if turn > 3 and measured:
            # What stays now is the error of the tokens kept: lean against it.
            aim = min(aim * capacity / measured, experts)
        logits_LEN = kept.read()
        L, E, _ = logits_LEN.shape
        rows = logits_LEN.reshape(1 if common else L * E, -1)
        thresholds = torch.tensor([threshold_of(row, aim / experts) for row in rows])
        quantiles_LE = thresholds.expand(L * E).view(L, E)
        # Later rounds go half the way: the tokens answer to the thresholds, and would swing.
        log_odds_LE = (log_odds_LE + quantiles_LE) / 2 if turn else quantiles_LE
        network.routing = RoutingMode(log_odds_LE=log_odds_LE)
    raise UserError(
        f"thresholds for capacity {capacity:g} do not settle: {ROUNDS} rounds end at "
        f"{measured:.4f}; take more samples, or another capacity"
    )


def threshold_of(values: Tensor, share: float) -> float:
    """The threshold above which lies as near as can be `share` of the values (1-D, fp32).

    Equal values are taken all or not at all. More share never gives a higher threshold.
    """
    ordered = values.sort(descending=True).values
    taken = round(share * len(ordered))
    if 0 < taken < len(ordered) and ordered[taken - 1] == ordered[taken]:
        above = int((ordered > ordered[taken]).sum())
        with_equals = int((ordered >= ordered[taken]).sum())
        taken = above if taken - above <= with_equals - taken else with_equals
    if taken == len(ordered):
        return EVERY_TOKEN
    if taken == 0:
        return float(ordered[0])
    middle = (ordered[taken - 1] + ordered[taken]) / 2
    return float(middle if middle < ordered[taken - 1] else ordered[taken])


class _Logits:
    """An observer that keeps the predictions for some tokens of every pass."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._seen: list[Tensor] = []

    def __call__(self, forward: Forward) -> None:
        logits_LSE = torch.stack([layer.capacity_logits_SE for layer in forward.routing])
        S = logits_LSE.shape[1]
        if self.tokens < S:
            generator = keyed_generator("calibrate", len(self._seen))
            some = torch.randperm(S, generator=generator)[: self.tokens]
            logits_LSE = logits_LSE[:, some.to(logits_LSE.device)]
        self._seen.append(logits_LSE.transpose(1, 2).cpu())

    def read(self) -> Tensor:
        """(L, E, N), fp32."""
        return torch.cat(self._seen, dim=2)
