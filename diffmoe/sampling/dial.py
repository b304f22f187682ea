"""Any capacity between calibrated ones, for a slider."""

from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from diffmoe.capacity.calibration import EVERY_TOKEN, calibrate
from diffmoe.capacity.thresholds import Calibrated, name_of, store, stored
from diffmoe.diffusion.settings import DIAL_STEPS, SamplingSettings
from diffmoe.models.routing_mode import RoutingMode
from diffmoe.sampling.passes import trajectory_passes
from diffmoe.sampling.sampler import Sampler

# Calibrated where fewer than two capacities are stored, as far as there are enough experts.
CAPACITIES = (0.25, 0.5, 1.0, 1.5, 2.0)
# The threshold for taking every token lies below all logits. Interpolation towards it ends here:
# hardly any logit is lower.
_LEAST = -16.0


class Dial:
    """Thresholds for every capacity between the lowest and the highest calibrated one.

    Between two calibrated capacities the thresholds, as logits, are interpolated. C falls as they
    rise, so the resulting capacity lies between the two as well.
    """

    def __init__(self, thresholds: dict[float, Tensor]) -> None:
        """thresholds: calibrated ones (L, E) as logits, by capacity; at least two."""
        self.capacities = sorted(thresholds)
        self._thresholds = [thresholds[capacity] for capacity in self.capacities]

    @classmethod
    def of(cls, sampler: Sampler, report: Callable[[str], None] = lambda text: None) -> "Dial":
        """From the capacities stored beside the model, else calibrated now, and stored if possible.

        Under names of their own, as they are coarser than those of tools/calibrate.py.
        """
        found = {
            entry.capacity: torch.tensor(entry.log_odds)
            for entry in stored(sampler.model.calibrated_in).values()
            if entry.weights == sampler.model.weights
        }
        # Where experts take every token there is nothing to interpolate.
        if sum(bool((logits_LE > EVERY_TOKEN).all()) for logits_LE in found.values()) < 2:
            labels = [k % sampler.choices for k in range(16)]
            settings = sampler.fitted(
                SamplingSettings(steps=DIAL_STEPS, guidance=None, shift=None), report
            )
            passes = trajectory_passes(sampler, labels, 16, settings)
            for capacity in CAPACITIES:
                if capacity < sampler.config.moe.experts and capacity not in found:
                    report(f"calibrating capacity {capacity:g}")
                    found[capacity], measured = calibrate(
                        sampler.network, capacity, passes, tolerance=0.03
                    )
                    entry = Calibrated(
                        weights=sampler.model.weights,
                        capacity=capacity,
                        measured=measured,
                        common=False,
                        over="trajectory",
                        samples=len(labels),
                        sampling=settings,
                        dtype=sampler.dtype,
                        log_odds=found[capacity].tolist(),
                    )
                    with suppress(OSError):  # as in a folder of somebody else's
                        store(sampler.model.calibrated_in, f"dial {name_of(capacity)}", entry)
        return cls(found)

    def at(self, capacity: float) -> RoutingMode:
        """Per-token routing by the thresholds of a capacity, or of the nearer end of the range."""
        capacity = min(max(capacity, self.capacities[0]), self.capacities[-1])
        right = bisect_left(self.capacities, capacity)
        logits_LE = self._thresholds[right]
        if capacity < self.capacities[right]:
            low, high = self.capacities[right - 1 : right + 1]
            start = self._thresholds[right - 1]
            end = torch.where(logits_LE > EVERY_TOKEN, logits_LE, start.clamp(max=_LEAST))
            logits_LE = torch.lerp(start, end, (capacity - low) / (high - low))
        return RoutingMode(calibrated_LE=logits_LE)
