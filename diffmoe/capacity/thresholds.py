"""Named capacity thresholds beside the weights that they were calibrated for.

`thresholds.json`, in a checkpoint's folder or an exported model's, holds for each name (such as
"0.8") the thresholds of all layers and experts and how they were found. The ones that training
tracked (Eq. 17) are part of the weights and have no entry.
"""

import hashlib
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffmoe.config import Config
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.files import contained, read_json, write_json
from diffmoe.models.dit import DiT
from diffmoe.models.routing_mode import RoutingMode, check_capacity

FILE_NAME = "thresholds.json"


class Calibrated(BaseModel):
    """Thresholds that meet a wanted capacity on real data.

    weights: ema or live, for which they hold. capacity, measured: C asked for and C met.
    common: one threshold for all experts, or one for each. over: "noise" levels as training draws
    them, or the "trajectory" of sampling, by the settings `sampling` and with `labels` "balanced"
    or "random". samples: how many it was measured on.
    log_odds: the thresholds by layer and expert, as logits.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: str
    capacity: float = Field(gt=0)
    measured: float
    common: bool
    over: str
    samples: int
    sampling: SamplingSettings | None = None
    labels: str = "balanced"
    log_odds: list[list[float]]

    @model_validator(mode="before")
    @classmethod
    def _once(cls, values: Any) -> Any:
        """Before `sampling` was stored, words held what could be chosen."""
        over = values.get("over") if isinstance(values, dict) else None
        found = re.fullmatch(r"trajectory: (\d+) steps, guidance (\S+)", str(over))
        if found is None:
            return values
        sampling = {"steps": found[1], "guidance": found[2]}
        return values | {"over": "trajectory", "sampling": sampling}

    def differs(self, settings: SamplingSettings, config: Config, met: float) -> str | None:
        """What to say where samples are made otherwise than the thresholds were; None: alike.

        met: the capacity of the samples.
        """
        if self.sampling is None:
            there, here = "on real data at the noise levels of training", "these samples"
        else:
            ours, theirs = (
                asdict(replace(s, sampler=s.chosen_sampler(config), seed=0))
                for s in (settings, self.sampling)
            )
            names = [name for name in ours if ours[name] != theirs[name]]
            if not names:
                return None
            there, here = (
                "with " + ", ".join(f"{name.replace('_', ' ')} {_told(of[name])}" for name in names)
                for of in (theirs, ours)
            )
        return (
            f"the thresholds of capacity {self.capacity:g} were calibrated {there}; {here} met "
            f"capacity {met:.3f}"
        )


def _told(value: Any) -> str:
    return ",".join(f"{time:g}" for time in value) if isinstance(value, tuple) else str(value)


def name_of(capacity: float) -> str:
    """0.8 for 0.8 and for 0.80: the name under which a capacity is stored."""
    return f"{capacity:g}"


def stored(folder: Path) -> dict[str, Calibrated]:
    """All entries of a checkpoint's or model's folder by their names; none where there is no file.

    Raises UserError if the file is not readable.
    """
    file = folder / FILE_NAME
    if not file.exists():
        return {}
    contained(folder, FILE_NAME)
    try:
        entries = read_json(file)
        return {name: Calibrated.model_validate(entry) for name, entry in entries.items()}
    except (UserError, AttributeError, ValidationError) as error:
        raise UserError(
            f"{file} is damaged ({error}); remove it and run tools/calibrate.py again"
        ) from None


def store(folder: Path, name: str, entry: Calibrated) -> None:
    """Add an entry, or replace the one of that name."""
    entries = stored(folder) | {name: entry}
    write_json(folder / FILE_NAME, {key: value.model_dump() for key, value in entries.items()})


def hash_of(network: DiT) -> str | None:
    """Stands for the thresholds in use: calibrating again changes the images."""
    if not network.has_thresholds:
        return None
    predictors = [layer.capacity_predictor for layer in network.moe_layers]
    used = [p.thresholds if p.log_odds is None else p.log_odds for p in predictors]
    return hashlib.sha256(torch.stack(used).cpu().numpy().tobytes()).hexdigest()


def set_capacity(
    network: DiT,
    folder: Path,
    routing: str | None = None,
    capacity: float | None = None,
    weights: str = "ema",
) -> Calibrated | None:
    """Choose how the network routes at inference, and how much it computes.

    Returns the calibration that it goes by, if any.

    folder: of its checkpoint or exported model. routing: per_token, pooled or static; None: the
    model's own. capacity: C; None: the thresholds of training. With static, every expert takes its
    share of C whatever the thresholds are. Raises UserError for what the model cannot do: one
    without a capacity predictor has neither to choose.
    """
    if not network.has_thresholds:
        for name, value in (("routing", routing), ("capacity", capacity)):
            if value is not None:
                raise UserError(
                    f"{name} {value}: a {network.moe_config.type} model has no {name} to choose; "
                    "leave it out"
                )
        return None
    if capacity is not None:
        check_capacity(capacity, network.moe_config.experts)
    kind = routing or network.moe_config.inference
    if kind == "static" or capacity is None:
        network.routing = RoutingMode(kind, capacity)
        return None
    entry = _calibrated(network, folder, capacity, weights)
    network.routing = RoutingMode(kind, log_odds_LE=torch.tensor(entry.log_odds))
    return entry


def _calibrated(network: DiT, folder: Path, capacity: float, weights: str) -> Calibrated:
    """The entry; raises UserError naming what is stored, and the way to get it."""
    entries = {n: e for n, e in stored(folder).items() if e.weights == weights}
    name = name_of(capacity)
    if name not in entries:
        there = f"calibrated are {', '.join(sorted(entries))}" if entries else "none is calibrated"
        raise UserError(
            f"{folder} has no thresholds for capacity {name} with {weights} weights ({there}); "
            f"run: python tools/calibrate.py {folder} --capacity {name} --weights {weights}"
        )
    log_odds = entries[name].log_odds
    L, E = len(network.moe_layers), network.moe_config.experts
    if [len(row) for row in log_odds] != [E] * L:
        raise UserError(
            f"{folder / FILE_NAME}: {name} is for {len(log_odds)} layers of {len(log_odds[0])} "
            f"experts, the model {L} of {E}; run tools/calibrate.py again"
        )
    return entries[name]
