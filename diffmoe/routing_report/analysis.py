"""What the experts of a trained model do, while it samples and on real data.

Shape letters as in models/routing.py. Only conditional passes are counted: those that guidance adds
would blur the differences between classes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.capacity.forward import Forward
from diffmoe.capacity.health import DEAD, dead_experts, load_entropy
from diffmoe.capacity.meter import CapacityByTime, CapacityMeter
from diffmoe.diffusion.samplers import Progress
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.routing_report.branches import watching
from diffmoe.sampling.passes import Passes
from diffmoe.sampling.sampler import Sampler

BINS = 20


class SamplingRouting(NamedTuple):
    """Of n samples. Shares and means are over all evaluations, fp64 or fp32.

    capacity: by time, layer and expert. unselected: (times, L), share of tokens that no expert
    takes. by_sample: (n,) C of each sample. compute: (n, T) experts at work on a token, mean over
    layers. grid: rows and columns of the T tokens.
    places: (L, E, T) share of samples in which the expert takes the token there.
    overlap: (L, E, E): of the tokens that expert i takes, the share that j takes too.
    labels: (n,); images: uint8 (n, H, W, C). health: numbers by MoE layer, see capacity/health.py.
    """

    capacity: CapacityByTime
    unselected: Tensor
    by_sample: Tensor
    compute: Tensor
    grid: tuple[int, int]
    places: Tensor
    overlap: Tensor
    labels: Tensor
    images: Tensor
    health: dict[str, list[float]]

    def by_class(self) -> dict[int, float]:
        """Mean C of each class, highest first."""
        means = {
            int(label): float(self.by_sample[self.labels == label].mean())
            for label in self.labels.unique()
        }
        return dict(sorted(means.items(), key=lambda item: -item[1]))

    def dead_experts(self) -> list[tuple[int, int]]:
        """(layer, expert) of those that take hardly any token, both counted from 0."""
        capacity_LE = self.capacity.by_layer_and_expert
        dead = capacity_LE < DEAD * capacity_LE.mean()
        return [(int(layer), int(expert)) for layer, expert in dead.nonzero()]


class PredictorAccuracy(NamedTuple):
    """The capacity predictor against the selection of training, on real data.

    precision, recall: (L,). For the token-expert pairs in each bin of probability, (BINS,):
    predicted, their mean probability; selected, the share that training would select; counts, their
    number.
    """

    precision: Tensor
    recall: Tensor
    predicted: Tensor
    selected: Tensor
    counts: Tensor


def sampling_routing(
    sampler: Sampler,
    labels: Sequence[int],
    settings: SamplingSettings,
    *,
    batch: int = 50,
    progress: Progress | None = None,
) -> SamplingRouting:
    """Sample images of `labels` and count in every evaluation.

    progress: called with the number of images done. Raises UserError for a dense model.
    """
    if not sampler.network.moe_layers:
        raise UserError("a dense model routes nothing; there is no report to write")
    meter, batches = CapacityMeter(), []

    def watch(samples: int) -> Callable[[Forward], None]:
        seen = _Batch(samples)
        batches.append(seen)

        def observe(forward: Forward) -> None:
            if not forward.unconditional:
                meter(forward)
                seen.add(forward)

        return observe

    with watching(sampler.network) as branches:
        made = sampler.images(labels, settings, batch=batch, watch=watch, progress=progress)
    unselected: dict[float, list[Tensor]] = {}
    samples: dict[float, int] = {}
    for seen in batches:
        for time, share_L in ((float(time), share_L) for time, share_L in seen.unselected):
            unselected.setdefault(time, []).append(share_L.cpu() * seen.samples)
            samples[time] = samples.get(time, 0) + seen.samples
    together_LEE = _sum(seen.together_LEE for seen in batches)
    own_LE = together_LEE.diagonal(dim1=1, dim2=2)
    capacity = meter.read()
    assert capacity is not None  # there are MoE layers
    return SamplingRouting(
        capacity=capacity,
        unselected=torch.stack(
            [_sum(unselected[time]) / samples[time] for time in sorted(unselected)]
        ),
        by_sample=torch.cat([seen.by_sample for seen in batches]),
        compute=torch.cat([seen.compute for seen in batches]),
        grid=sampler.network.config.grid,
        places=_sum(seen.places * seen.samples for seen in batches) / len(labels),
        overlap=together_LEE / own_LE.clamp(min=1)[:, :, None],
        labels=torch.tensor(labels),
        images=made.images,
        health=branches.health() | _routing_health(capacity, unselected, samples),
    )


def _routing_health(
    capacity: CapacityByTime, unselected: dict[float, list[Tensor]], samples: dict[float, int]
) -> dict[str, list[float]]:
    load_LE = capacity.by_layer_and_expert
    taken_nLE = capacity.capacity / load_LE.shape[1]  # share of tokens at each time
    weights_n11 = (capacity.tokens / capacity.tokens.sum())[:, None, None]
    mean_LE = (taken_nLE * weights_n11).sum(0)
    between_L = ((taken_nLE - mean_LE).square() * weights_n11).sum((0, 2))
    total_L = (mean_LE * (1 - mean_LE)).sum(1)
    shares = [_sum(seen) for seen in unselected.values()]
    return {
        "time_share": (between_L / total_L.clamp(min=1e-12)).tolist(),
        "unselected_share": (_sum(shares) / sum(samples.values())).tolist(),
        "load_entropy": load_entropy(load_LE).tolist(),
        "dead_experts": dead_experts(load_LE).tolist(),
    }


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


class _Batch:
    """Sums over the evaluations of one batch of B samples."""

    def __init__(self, samples: int) -> None:
        self.samples, self.passes = samples, 0
        self.unselected: list[tuple[Tensor, Tensor]] = []
        self._compute_BT = self._places_LET = self._together_LEE = torch.zeros(())

    def add(self, forward: Forward) -> None:
        selected_LES = torch.stack([layer.selected_ES for layer in forward.routing]).float()
        L = len(selected_LES)
        self.unselected.append((forward.time, (selected_LES.sum(1) == 0).double().mean(1)))
        by_sample = selected_LES.unflatten(2, (self.samples, -1))  # (L, E, B, T)
        self._compute_BT = self._compute_BT + by_sample.sum((0, 1)) / L
        self._places_LET = self._places_LET + by_sample.mean(2)
        self._together_LEE = self._together_LEE + selected_LES @ selected_LES.transpose(1, 2)
        self.passes += 1

    @property
    def compute(self) -> Tensor:
        return (self._compute_BT / self.passes).cpu()

    @property
    def by_sample(self) -> Tensor:
        return self.compute.mean(1)

    @property
    def places(self) -> Tensor:
        return (self._places_LET / self.passes).cpu()

    @property
    def together_LEE(self) -> Tensor:
        """How many tokens experts i and j both take."""
        return self._together_LEE.double().cpu()


@torch.inference_mode()
def predictor_accuracy(network: DiT, passes: Passes) -> PredictorAccuracy:
    """Run passes over real data with the selection of training and compare the predictor with it.

    The pool is the batch of one pass. Afterwards the network routes as before.
    """
    layers = len(network.moe_layers)
    right, predicted, selected = (torch.zeros(layers, dtype=torch.float64) for _ in range(3))
    sums = torch.zeros(3, BINS, dtype=torch.float64)  # probability, selected, pairs

    def observe(forward: Forward) -> None:
        for number, (layer, routing) in enumerate(
            zip(network.thresholded_layers, forward.routing, strict=True)
        ):
            logits_SE, selected_SE = routing.capacity_logits_SE, routing.selected_ES.t()
            assert logits_SE is not None
            predicted_SE = layer.wanted(logits_SE)
            right[number] += int((predicted_SE & selected_SE).sum())
            predicted[number] += int(predicted_SE.sum())
            selected[number] += int(selected_SE.sum())
            probability = logits_SE.sigmoid().flatten().double().cpu()
            place = (probability * BINS).long().clamp(max=BINS - 1)
            for row, values in enumerate(
                (probability, selected_SE.flatten().double().cpu(), torch.ones_like(probability))
            ):
                sums[row].index_add_(0, place, values)

    if network.routing is None or not network.has_predictors:
        raise UserError("only a model with a capacity predictor has one to compare")
    as_in_training = replace(network.routing, kind="static", capacity=None)
    with network.routed(as_in_training):
        passes.run(observe)
    probability_sum, selected_sum, counts = sums
    filled = counts.clamp(min=1)
    return PredictorAccuracy(
        precision=right / predicted.clamp(min=1),
        recall=right / selected,
        predicted=probability_sum / filled,
        selected=selected_sum / filled,
        counts=counts,
    )
