"""The learning rate as a function of the clock."""

import math
from collections.abc import Mapping
from typing import Any

from diffmoe.config import OptimizerConfig


def learning_rate(
    optimizer: OptimizerConfig, samples: int, total_samples: int, peak: float | None = None
) -> float:
    """The rate at a clock: linear warm-up, then constant, or down to zero at the end.

    Down by half a cosine, or over the last decay_samples as 1 - sqrt (arXiv 2405.18392, section 3).
    peak: the rate after the warm-up; default optimizer.learning_rate.
    """
    rate = optimizer.learning_rate if peak is None else peak
    if samples < optimizer.warmup_samples:
        return rate * samples / optimizer.warmup_samples
    if optimizer.schedule == "cosine":
        span = max(1, total_samples - optimizer.warmup_samples)
        # The last batch may reach past the end.
        done = min(1.0, (samples - optimizer.warmup_samples) / span)
        rate *= 0.5 * (1 + math.cos(math.pi * done))
    elif optimizer.schedule == "warmup_stable_decay":
        left = min(optimizer.decay_samples, max(0, total_samples - samples))
        rate *= 1 - math.sqrt(1 - left / optimizer.decay_samples)
    return rate


def end_matters_from(settings: Mapping[str, Any]) -> float:
    """The clock from which the rate depends on where the run ends. settings: by dotted key."""
    schedule = settings["optimizer.schedule"]
    if schedule == "warmup_stable_decay":
        return settings["training.total_samples"] - settings["optimizer.decay_samples"]
    return math.inf if schedule == "constant" else 0
