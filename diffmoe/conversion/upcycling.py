"""Turns a dense model into a mixture of experts, or gives a mixture more experts, output unchanged.

The router's gates are a softmax, so they sum to 1 over the experts, and E equal experts give the
dense MLP's output exactly if every token is processed by all of them: at capacity C = E. At C = 1 a
token is processed by about one expert with a gate of about 1/E, some tokens by none, some by
several; no scaling is right for every token. Hence two ways:

- `shared` (default): the dense MLP becomes a shared expert, which processes every token. The
  experts start with its first layer and a second layer of zeros. The output is the dense model's
  bit for bit, in training and evaluation, at any capacity and routing. A token costs C more MLPs.
- `copies`: every expert is the dense MLP, without a shared one. Equal up to rounding at C = E,
  where a token costs E MLPs. At a smaller C the second layer is multiplied by E / C, which makes
  the output right on average over tokens, not for each.
"""

import json
import math
import re
from typing import Any, Literal

import torch
from torch import Tensor

from diffmoe.config import MoEConfig
from diffmoe.errors import UserError
from diffmoe.export.metadata import Metadata
from diffmoe.export.sources import Source
from diffmoe.export.tensors import expected_shapes, meta_network
from diffmoe.models.moe import ROUTING_STATE
from diffmoe.seeding import keyed_generator

How = Literal["shared", "copies"]

# An expert's stacked tensor -> the dense MLP's tensor.
_OF_DENSE = {
    "gelu": {"w_in": "fc1.weight", "b_in": "fc1.bias", "w_out": "fc2.weight", "b_out": "fc2.bias"},
    "swiglu": {"w_gate": "gate.weight", "w_up": "up.weight", "w_out": "down.weight"},
}


def upcycle(
    source: Source,
    experts: int,
    every_block: bool = False,
    how: How = "shared",
    capacity: float | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> Source:
    """A DiffMoE made of a dense model. `seed` is for its router and capacity predictor.

    capacity: C to train with; None: 1 for `shared`, E for `copies`. noise: added to the experts'
    weights, in standard deviations of each tensor; with `shared` to their first layer only, so that
    the output stays. (Experts of `shared` also diverge without noise: they see different tokens.)
    Raises UserError for settings that do not fit the source.
    """
    metadata = source.metadata
    if metadata.moe.type != "dense":
        raise UserError(f"{source.where} already has {metadata.moe.experts} experts; use --grow")
    if experts < 2:
        raise UserError(f"--experts {experts}: choose at least 2")
    if capacity is None:
        capacity = 1.0 if how == "shared" else float(experts)
    if not 0 < capacity <= experts:
        raise UserError(f"--capacity {capacity:g}: choose one above 0, at most {experts} (experts)")
    ratio = metadata.model.mlp_ratio
    moe = metadata.moe.model_dump() | {
        "type": "diffmoe",
        "experts": experts,
        "every_block": every_block,
        "activation": metadata.model.mlp_activation,
        "capacity": capacity,
        "expert_ratio": ratio,
        "shared_expert_ratio": ratio if how == "shared" else 0.0,
        "shared_expert_activation": metadata.model.mlp_activation,
        # Scaled experts are right only at their capacity, and the predictor is not trained yet.
        "inference": "static" if how == "copies" and capacity < experts else "per_token",
    }
    if how == "copies":  # whose gates must sum to 1
        moe |= {"gate": "softmax", "gate_scale": 1.0}
    step = f"upcycled to {experts} experts ({how}, capacity {capacity:g}, noise {noise:g})"
    made = _changed(metadata, moe, step)

    def read(name: str) -> Tensor:
        found = re.fullmatch(r"(blocks\.\d+\.feed_forward)\.(.+)", name)
        if found is None or name in source.shapes:
            return source.read(name)
        layer, part = found.groups()
        if part.startswith("shared_expert."):
            return source.read(f"{layer}.{part.removeprefix('shared_expert.')}")
        if part.endswith(".thresholds"):
            return torch.zeros(experts)
        if not part.startswith("experts."):
            return meta_network(made.model, made.moe).initial_value(name, seed)
        leaf = part.removeprefix("experts.")
        one = source.read(f"{layer}.{_OF_DENSE[made.moe.activation][leaf]}")
        one = one.t() if leaf.startswith("w_") else one
        if leaf.endswith("_out"):
            one = one * (0.0 if how == "shared" else experts / capacity)
        return _noisy(one.expand(experts, *one.shape), noise, seed, name)

    notes = (*source.notes, step, _settings_note(made.moe))
    if how == "copies" and not noise and capacity == experts:
        notes += (
            "warning: equal experts that process the same tokens stay equal; add --noise 0.01",
        )
    return Source(
        source.where, made, expected_shapes(made.model, made.moe), read, run=source.run, notes=notes
    )


def grow(source: Source, experts: int, noise: float = 0.0, seed: int = 0) -> Source:
    """A mixture with a multiple of its experts: each is copied.

    With two of each, the softmax halves their gates (as DSMoE's division by the sum does; otherwise
    the scale is halved), and at
    twice the capacity both take the same tokens, so the output is unchanged up to rounding: with
    per-token and pooled routing because the predictor and its thresholds are copied, too; in
    training and with static routing at the capacity set here. noise: added to the copies, not the
    originals; without it they stay equal in training. Calibrated capacities are dropped. Raises
    UserError for settings that do not fit.
    """
    metadata, old = source.metadata, source.metadata.moe.experts
    if metadata.moe.type == "dense":
        raise UserError(f"{source.where} is dense; use --upcycle")
    if experts < old:
        raise UserError(
            f"--experts {experts}: {source.where} has {old}. Fewer are refused: neither dropping "
            "nor averaging experts keeps the output. To compute less, choose a lower capacity "
            "(tools/calibrate.py)"
        )
    if experts == old or experts % old:
        raise UserError(
            f"--experts {experts}: {source.where} has {old}; choose a multiple, such as {2 * old}"
        )
    if metadata.moe.type == "dsmoe" and metadata.moe.top_k == 1:
        raise UserError(
            f"{source.where} takes one expert for a token (moe.top_k=1), whose score is its gate; "
            "two copies would share it: a dsmoe model grows from moe.top_k=2 on"
        )
    times = experts // old
    # What divides gates by a sum over experts halves them by itself where each is there twice.
    shared_out = metadata.moe.gate == "softmax" or metadata.moe.type == "dsmoe"
    moe = metadata.moe.model_dump() | {
        "experts": experts,
        "capacity": metadata.moe.capacity * times,
        "capacity_rounding": "exact",  # in floats, K could differ at the multiple
        "top_k": metadata.moe.top_k * times,
        "gate_scale": metadata.moe.gate_factor / (1 if shared_out else times),
    }
    step = f"grown from {old} to {experts} experts (noise {noise:g})"
    made = _changed(metadata, moe, step)
    shapes = expected_shapes(made.model, made.moe)

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        if shapes[name] == source.shapes[name]:
            return tensor
        copies = tensor.repeat(times, *[1] * (tensor.dim() - 1))
        if not name.endswith(ROUTING_STATE):
            copies[old:] = _noisy(copies[old:], noise, seed, name)
        return copies

    notes = (*source.notes, step, _settings_note(made.moe))
    if not noise:
        notes += ("warning: copies of an expert stay equal in training; add --noise 0.01",)
    return Source(source.where, made, shapes, read, run=source.run, notes=notes)


def _settings_note(moe: MoEConfig) -> str:
    """What a run with these weights has to set."""
    usual = MoEConfig(type=moe.type).model_dump()
    changed = {name: value for name, value in moe.model_dump().items() if value != usual[name]}
    settings = {"experts": moe.experts, "capacity": moe.capacity} | changed
    given = " ".join(f"moe.{name}={_setting(value)}" for name, value in settings.items())
    return f"train with training.init=TO {given}"


def _setting(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else json.dumps(value).strip('"')


def _changed(metadata: Metadata, moe: dict[str, Any], step: str) -> Metadata:
    """With another moe section, and one more step of its provenance."""
    made = metadata.provenance
    return metadata.replace(moe=moe, provenance={**made.model_dump(), "steps": (*made.steps, step)})


def _noisy(tensor: Tensor, noise: float, seed: int, name: str) -> Tensor:
    """The tensor plus normal noise, in standard deviations of the tensor."""
    if noise < 0 or not math.isfinite(noise):
        raise UserError(f"--noise {noise:g}: choose 0 or more, such as 0.01")
    if not noise:
        return tensor
    generator = keyed_generator(seed, "upcycling", name)
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
    return tensor + drawn * (noise * tensor.std())
