"""The settings of sampling, their defaults and their checks. Imports no torch."""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from diffmoe.config import Config
from diffmoe.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# The defaults of all that samples. Live evaluation has its own, config.EvaluationConfig.
STEPS = 250  # tools/sample.py and tools/evaluate.py: as the paper's figures
PREVIEW_STEPS = 50  # Pipeline, the demo, calibration and the routing report
DIAL_STEPS = 20  # calibration at the start of the demo
GUIDANCE = 1.5  # where nobody chooses another and the model was trained with label dropout

SamplerName = Literal["euler", "heun", "dopri5", "sde", "ddpm", "ddim"]
SAMPLERS: dict[str, tuple[SamplerName, ...]] = {
    "flow": ("euler", "heun", "dopri5", "sde"),
    "ddpm": ("ddpm", "ddim"),
}


SHIFTED: tuple[SamplerName, ...] = ("euler", "heun", "sde")  # whose steps a shift spaces


@dataclass(frozen=True)
class SamplingSettings:
    """How to get from noise to data. With the weights and the labels it determines the images.

    sampler: None takes the objective's default, euler or ddpm.
    guidance: scale; 1 is none, None leaves it to `sampling.Sampler.fitted`.
    guidance_interval: times between which guidance acts, 0 is noise and 1 data.
    guided_channels: guide only the first ones, as the release's DDPM runs do with 3; None: all.
    shift: spacing of a flow's times (samplers.time_grid), None leaves it to `with_shift_of`.
    eta: noise of ddim.
    """

    sampler: SamplerName | None = None
    steps: int = STEPS
    guidance: float | None = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guided_channels: int | None = None
    shift: float | None = 1.0
    eta: float = 0.0
    seed: int = 0

    def chosen_sampler(self, config: Config) -> SamplerName:
        """The sampler: the one that was set, or the default of the model's objective."""
        return self.sampler or SAMPLERS[config.diffusion.objective][0]

    def with_shift_of(self, config: Config) -> "SamplingSettings":
        """Where no shift was chosen, that of training, if the sampler has one."""
        if self.shift is not None:
            return self
        shifts = self.chosen_sampler(config) in SHIFTED
        return replace(self, shift=config.timestep_shift if shifts else 1.0)

    def check(self, config: Config) -> None:
        """Raise UserError where the settings do not fit the model's objective and channels."""
        objective, sampler = config.diffusion.objective, self.chosen_sampler(config)
        if sampler not in SAMPLERS[objective]:
            raise UserError(
                f"sampler {sampler}: a {objective} model takes {', '.join(SAMPLERS[objective])}"
            )
        if self.guidance is None or self.shift is None:
            raise ValueError("None is left open: give the settings to Sampler.fitted first")
        for name in ("guidance", "shift", "eta"):
            if not math.isfinite(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)}: give a finite number")
        least = 1 if objective == "flow" and sampler != "sde" else 2
        most = 1000 if objective == "ddpm" else math.inf
        if sampler != "dopri5" and not least <= self.steps <= most:
            raise UserError(
                f"{self.steps} sampling steps: {sampler} takes {least} or more"
                + (", up to 1000" if objective == "ddpm" else "")
            )
        channels = config.model.in_channels
        if self.guided_channels is not None and not 1 <= self.guided_channels <= channels:
            raise UserError(f"guided_channels={self.guided_channels}: choose 1 to {channels}")
        if self.shift != 1 and sampler not in SHIFTED:
            raise UserError(f"shift={self.shift} spaces the steps of {', '.join(SHIFTED)} alone")
        if not 0 <= self.eta <= 1 or not 1e-3 <= self.shift <= 1e3:
            raise UserError(
                f"eta={self.eta}, shift={self.shift}: eta is from 0 to 1, shift from 0.001 to 1000"
            )
        if self.eta and sampler != "ddim":
            raise UserError(f"eta={self.eta} belongs to the sampler ddim; {sampler} has none")
        interval = self.guidance_interval
        if len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise UserError(
                f"guidance interval {','.join(map(str, interval))}: two rising times from 0, "
                "noise, to 1, data"
            )


def time_of(config: Config, t: "Tensor") -> "Tensor":
    """The network's t (n,) as a time from 0, noise, to 1, data."""
    return t if config.diffusion.objective == "flow" else 1 - t.float() / 1000


def t_of(config: Config, time: float) -> float:
    """The inverse of `time_of`, for one time."""
    return time if config.diffusion.objective == "flow" else 1000 * (1 - time)
