"""Any capacity between calibrated ones, for a slider."""

from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffmoe.capacity.calibration import EVERY_TOKEN, calibrate
from diffmoe.capacity.thresholds import stored
from diffmoe.config import Config
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.models.dit import DiT
from diffmoe.models.routing_mode import RoutingMode
from diffmoe.sampling.latents import fitted
from diffmoe.sampling.passes import trajectory_passes
from diffmoe.text.prompts import Prompts

# What is calibrated where fewer than two capacities are stored, as far as there are experts.
CAPACITIES = (0.25, 0.5, 1.0, 1.5, 2.0)
SETTINGS = SamplingSettings(steps=20, guidance=None)
# Where every token is taken the threshold lies below all; towards it the dial goes as far as here,
# below which there is hardly a prediction.
_LEAST = -16.0


class Dial:
    """Thresholds for every capacity from the lowest to the highest of some calibrated ones.

    Between two of them the log odds are interpolated: C falls as they rise, so the capacity lies
    between too.
    """

    def __init__(self, log_odds: dict[float, Tensor]) -> None:
        """log_odds: (L, E) by capacity, at least two."""
        self.capacities = sorted(log_odds)
        self._log_odds = [log_odds[capacity] for capacity in self.capacities]

    @classmethod
    def of(
        cls,
        network: DiT,
        config: Config,
        folder: Path,
        weights: str = "ema",
        report: Callable[[str], None] | None = None,
        prompts: Prompts | None = None,
    ) -> "Dial":
        """From the capacities stored in a model's folder, else calibrated now, in memory."""
        found = {
            entry.capacity: torch.tensor(entry.log_odds)
            for entry in stored(folder).values()
            if entry.weights == weights
        }
        # Where experts take every token there is nothing to interpolate by.
        if sum(bool((log_odds > EVERY_TOKEN).all()) for log_odds in found.values()) < 2:
            kinds = config.model.num_classes if prompts is None else len(prompts)
            labels = [k % kinds for k in range(16)]
            settings = fitted(SETTINGS, config, prompts, report or (lambda _: None))
            passes = trajectory_passes(network, config, labels, 16, settings, prompts)
            for capacity in CAPACITIES:
                if capacity < config.moe.experts and capacity not in found:
                    if report is not None:
                        report(f"calibrating capacity {capacity:g}")
                    found[capacity], _ = calibrate(network, capacity, passes, tolerance=0.03)
        return cls(found)

    def turn(self, network: DiT, capacity: float) -> None:
        """Route per token by the thresholds of a capacity, from the range or at its nearer end."""
        capacity = min(max(capacity, self.capacities[0]), self.capacities[-1])
        right = bisect_left(self.capacities, capacity)
        log_odds_LE = self._log_odds[right]
        if capacity < self.capacities[right]:
            low, high = self.capacities[right - 1 : right + 1]
            start = self._log_odds[right - 1]
            end = torch.where(log_odds_LE > EVERY_TOKEN, log_odds_LE, start.clamp(max=_LEAST))
            log_odds_LE = torch.lerp(start, end, (capacity - low) / (high - low))
        network.routing = RoutingMode(log_odds_LE=log_odds_LE)
