"""Any capacity between calibrated ones, for a slider."""

from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from diffmoe.config import Config
from diffmoe.inference.calibration import EVERY_TOKEN, calibrate
from diffmoe.inference.passes import trajectory_passes
from diffmoe.inference.prompts import Prompts
from diffmoe.inference.sampling import SamplingSettings
from diffmoe.inference.thresholds import stored
from diffmoe.models.dit import DiT
from diffmoe.models.routing_mode import RoutingMode

# What is calibrated where fewer than two capacities are stored, as far as there are experts.
CAPACITIES = (0.25, 0.5, 1.0, 1.5, 2.0)
SETTINGS = SamplingSettings(steps=20, guidance=1.5)


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
            if entry.weights == weights and min(map(min, entry.log_odds)) > EVERY_TOKEN
        }
        if len(found) < 2:
            kinds = config.model.num_classes if prompts is None else len(prompts)
            labels = [k % kinds for k in range(16)]
            passes = trajectory_passes(network, config, labels, 16, SETTINGS, prompts)
            for capacity in CAPACITIES:
                if capacity < config.moe.experts:
                    if report is not None:
                        report(f"calibrating capacity {capacity:g}")
                    found[capacity], _ = calibrate(network, capacity, passes, tolerance=0.03)
        return cls(found)

    def turn(self, network: DiT, capacity: float) -> None:
        """Route per token by the thresholds of a capacity, from the range or at its nearer end."""
        right = bisect_left(self.capacities, capacity)
        if right == 0 or right == len(self.capacities):
            end = self._log_odds[min(right, len(self.capacities) - 1)]
            network.routing = RoutingMode(log_odds_LE=end)
            return
        low, high = self.capacities[right - 1 : right + 1]
        weight = (capacity - low) / (high - low)
        between = torch.lerp(*self._log_odds[right - 1 : right + 1], weight)
        network.routing = RoutingMode(log_odds_LE=between)
