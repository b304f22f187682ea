"""Thresholds that meet a requested capacity (Eq. 14, 16): quantiles of the predictor's logits.

Thresholds are logits: of the many tokens that the predictor is sure of, the probabilities all
round to 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from diffmoe.capacity.forward import Forward, Observer
from diffmoe.capacity.meter import CapacityMeter
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.models.routing_mode import RoutingMode, check_capacity
from diffmoe.seeding import keyed_generator

# At most so many logits are kept of each expert: the error of a quantile is far below 1 %.
BUDGET = 400_000
EVERY_TOKEN = -1e9  # below every logit
# A layer's thresholds change the tokens of the layers behind it, so quantiles are taken again.
ROUNDS = 12


class Passes(NamedTuple):
    """Forward passes to calibrate on. run: does them all and shows each to the observer."""

    count: int  # type: ignore[assignment]  # hides tuple.count
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
    """Find thresholds with which C_avg (Eq. 15) over the passes is `capacity`.

    Returns the thresholds (L, E), as logits, and C_avg. The network is left routing by them.

    common: one threshold for all experts and layers, else each expert takes its share C / E.
    Raises UserError if C_avg does not come within `tolerance` (relative), as when too many logits
    are equal.
    """
    experts = network.moe_config.experts
    if not network.has_thresholds:
        raise UserError(
            f"a {network.moe_config.type} model has no thresholds, nothing to calibrate"
        )
    check_capacity(capacity, experts)
    aim, measured = capacity, float("nan")
    thresholds_LE: Tensor | None = None
    network.routing = RoutingMode()  # the first round uses the thresholds of training
    for turn in range(ROUNDS + 1):
        meter, kept = CapacityMeter(), _Logits(max(1, BUDGET // passes.count))

        bar = tqdm(total=passes.count, desc=f"round {turn}", unit="pass", leave=False, disable=None)

        def observe(forward: Forward, meter=meter, kept=kept, bar=bar) -> None:
            meter(forward)
            kept(forward)
            bar.update()

        with bar:
            passes.run(observe)
        seen = meter.read()
        assert seen is not None  # a network with thresholds has MoE layers
        measured = seen.average
        if report is not None:
            report(f"round {turn}: capacity {measured:.4f}, requested {capacity:g}")
        if thresholds_LE is not None and abs(measured / capacity - 1) <= tolerance:
            return thresholds_LE, measured
        if turn > 3 and measured:
            # What remains comes from keeping only some of the logits: correct for it.
            aim = min(aim * capacity / measured, experts)
        logits_LEN = kept.read()
        L, E, _ = logits_LEN.shape
        rows = logits_LEN.reshape(1 if common else L * E, -1)
        thresholds = torch.tensor([threshold_of(row, aim / experts) for row in rows])
        quantiles_LE = thresholds.expand(L * E).view(L, E)
        # Later rounds go half the way: tokens react to the thresholds, and would oscillate.
        thresholds_LE = (
            quantiles_LE if thresholds_LE is None else (thresholds_LE + quantiles_LE) / 2
        )
        network.routing = RoutingMode(calibrated_LE=thresholds_LE)
    raise UserError(
        f"thresholds for capacity {capacity:g} do not settle: {ROUNDS} rounds end at "
        f"{measured:.4f}; take more samples, or another capacity"
    )


def threshold_of(values: Tensor, share: float) -> float:
    """The threshold above which the share of values (1-D, fp32) is closest to `share`.

    Equal values are taken all or not at all. A larger share never gives a higher threshold.
    """
    ordered = values.sort(descending=True).values
    selected = round(share * len(ordered))
    if 0 < selected < len(ordered) and ordered[selected - 1] == ordered[selected]:
        above = int((ordered > ordered[selected]).sum())
        with_equals = int((ordered >= ordered[selected]).sum())
        selected = above if selected - above <= with_equals - selected else with_equals
    if selected == len(ordered):
        return EVERY_TOKEN
    if selected == 0:
        return float(ordered[0])
    middle = (ordered[selected - 1] + ordered[selected]) / 2
    return float(middle if middle < ordered[selected - 1] else ordered[selected])


class _Logits:
    """An observer that keeps the predictor's logits for some tokens of every pass."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._seen: list[Tensor] = []

    def __call__(self, forward: Forward) -> None:
        of_layers = [layer.capacity_logits_SE for layer in forward.routing]
        logits_LSE = torch.stack([logits_SE for logits_SE in of_layers if logits_SE is not None])
        S = logits_LSE.shape[1]
        if self.tokens < S:
            generator = keyed_generator("calibrate", len(self._seen))
            some = torch.randperm(S, generator=generator)[: self.tokens]
            logits_LSE = logits_LSE[:, some.to(logits_LSE.device)]
        self._seen.append(logits_LSE.transpose(1, 2).cpu())

    def read(self) -> Tensor:
        """(L, E, N), fp32."""
        return torch.cat(self._seen, dim=2)
