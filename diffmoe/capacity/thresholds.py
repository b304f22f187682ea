"""What `--capacity` does: thresholds by the name of their capacity, stored beside the weights.

`thresholds.json`, in the folder of a checkpoint or an exported model, holds for each name (such as
"0.8") the thresholds of all layers and experts and how they were found. The thresholds that
training tracked (Eq. 17) are part of the weights and have no entry.
"""

import hashlib
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from diffmoe.config import Config
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.files import contained, read_json, write_json
from diffmoe.models.dit import DiT
from diffmoe.models.routing_mode import Kind, RoutingMode, check_capacity

FILE_NAME = "thresholds.json"


class Calibrated(BaseModel):
    """Thresholds that meet a requested capacity, and how they were found.

    weights: ema or live, for which they hold. capacity, measured: C requested and C met.
    common: one threshold for all experts, or one for each. over: "noise" levels as training draws
    them, or the "trajectory" of sampling with the settings `sampling` and with `labels` "balanced"
    or "random". samples: how many it was measured on. dtype: what the network computed in.
    log_odds: the calibrated thresholds (L, E), as logits.
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
    dtype: str = "fp32"
    log_odds: list[list[float]]

    @model_validator(mode="before")
    @classmethod
    def _from_old_files(cls, values: Any) -> Any:
        """Files written before `sampling` was stored have steps and guidance in `over`."""
        over = values.get("over") if isinstance(values, dict) else None
        found = re.fullmatch(r"trajectory: (\d+) steps, guidance (\S+)", str(over))
        if found is None:
            return values
        sampling = {"steps": found[1], "guidance": found[2]}
        return values | {"over": "trajectory", "sampling": sampling}

    def differs(self, settings: SamplingSettings, config: Config, met: float) -> str | None:
        """A note for samples made with other settings than the calibration; None: the same.

        met: the capacity of the samples.
        """
        if self.sampling is None:
            calibrated, here = "on real data at the noise levels of training", "these samples"
        else:
            ours, theirs = (
                asdict(replace(s, sampler=s.chosen_sampler(config), seed=0))
                for s in (settings, self.sampling)
            )
            names = [name for name in ours if ours[name] != theirs[name]]
            if not names:
                return None
            calibrated, here = (
                "with " + ", ".join(f"{name.replace('_', ' ')} {_text(of[name])}" for name in names)
                for of in (theirs, ours)
            )
        return (
            f"the thresholds of capacity {self.capacity:g} were calibrated {calibrated}; {here} "
            f"met capacity {met:.3f}"
        )


def _text(value: Any) -> str:
    return ",".join(f"{time:g}" for time in value) if isinstance(value, tuple) else str(value)


def name_of(capacity: float) -> str:
    """The name under which a capacity is stored: 0.8 for 0.8 and for 0.80."""
    return f"{capacity:g}"


def stored(folder: Path) -> dict[str, Calibrated]:
    """All entries of the folder of a checkpoint or an exported model, by name.

    Empty where there is no file. Raises UserError if the file is damaged.
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
    """Add an entry, or replace the one of the same name."""
    entries = stored(folder) | {name: entry}
    write_json(folder / FILE_NAME, {key: value.model_dump() for key, value in entries.items()})


def hash_of(network: DiT) -> str | None:
    """SHA-256 of the thresholds in use: other ones give other images. None without thresholds."""
    mode = network.routing
    if mode is None:
        return None
    used_LE = network.thresholds_LE if mode.calibrated_LE is None else mode.calibrated_LE
    return hashlib.sha256(used_LE.cpu().numpy().tobytes()).hexdigest()


class CapacityChoice(NamedTuple):
    """How a network routes at inference, and so how much it computes.

    mode: for `network.routed`; None leaves the network's routing as it is.
    capacity: C as requested; None: that of training. calibrated: the entry in use, if any.
    """

    mode: RoutingMode | None = None
    capacity: float | None = None
    calibrated: Calibrated | None = None


def choose_capacity(
    network: DiT,
    folder: Path,
    routing: Kind | None = None,
    capacity: float | None = None,
    weights: str = "ema",
) -> CapacityChoice:
    """The routing mode for a requested kind of routing and capacity. The network stays as it is.

    folder: of its checkpoint or exported model. routing: per_token, pooled or static; None: the
    model's own. capacity: C; None: the thresholds of training. With static, every expert takes its
    share of C and no thresholds are used. Raises UserError for what the model cannot do: one
    without a capacity predictor has neither to choose.
    """
    if not network.has_thresholds:
        for name, value in (("routing", routing), ("capacity", capacity)):
            if value is not None:
                raise UserError(
                    f"{name} {value}: a {network.moe_config.type} model has no {name} to choose; "
                    "leave it out"
                )
        return CapacityChoice()
    if capacity is not None:
        check_capacity(capacity, network.moe_config.experts)
    kind = routing or network.moe_config.inference
    if kind == "static" or capacity is None:
        return CapacityChoice(RoutingMode(kind, capacity), capacity)
    entry = _calibrated(network, folder, capacity, weights)
    return CapacityChoice(
        RoutingMode(kind, calibrated_LE=torch.tensor(entry.log_odds)), capacity, entry
    )


def _calibrated(network: DiT, folder: Path, capacity: float, weights: str) -> Calibrated:
    """The stored entry. Raises UserError with what is stored and the command that calibrates."""
    entries = {n: e for n, e in stored(folder).items() if e.weights == weights}
    name = name_of(capacity)
    if name not in entries:
        available = (
            f"calibrated are {', '.join(sorted(entries))}" if entries else "none is calibrated"
        )
        raise UserError(
            f"{folder} has no thresholds for capacity {name} with {weights} weights ({available}); "
            f"run: python tools/calibrate.py {folder} --capacity {name} --weights {weights}"
        )
    log_odds = entries[name].log_odds
    L, E = len(network.moe_layers), network.moe_config.experts
    if [len(row) for row in log_odds] != [E] * L:
        raise UserError(
            f"{folder / FILE_NAME}: {name} is for {len(log_odds)} layers of {len(log_odds[0])} "
            f"experts, the model has {L} of {E}; run tools/calibrate.py again"
        )
    return entries[name]
