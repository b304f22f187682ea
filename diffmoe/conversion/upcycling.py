"""A dense model becomes a mixture of experts, and a mixture gets more experts; outputs stay.

The router's gates are a softmax, so they sum to 1 over the experts, and E equal experts give the
dense MLP's output exactly if every token meets all of them: at capacity C = E. At C = 1 a token
meets about one expert of gate about 1/E, some none and some several, and no scaling mends that for
each token. Hence two ways:

- `shared` (default): the dense MLP becomes a shared expert, which sees every token, and the experts
  begin with its first layer and a second layer of zeros. The output is the dense model's bit for
  bit, in training and evaluation, at any capacity and routing. A token costs C more MLPs.
- `copies`: every expert is the dense MLP, there is no shared one. Equal to rounding at C = E, where
  a step costs E MLPs a token. At a smaller C their second layer is multiplied by E / C, which makes
  the output right on average over tokens, and not for each.
"""

import math
import re
from typing import Literal

import torch
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.export.metadata import Metadata
from diffmoe.export.sources import Source
from diffmoe.export.tensors import empty_network, expected_shapes
from diffmoe.models.dit import DiT
from diffmoe.seeding import keyed_generator

How = Literal["shared", "copies"]

# Of an expert's stacked tensor, the dense MLP's.
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
    """A DiffMoE of a dense model. Router and capacity predictor are drawn by `seed`.

    capacity: C to train with; None takes 1 for `shared`, E for `copies`. noise: added to the
    experts' weights, in standard deviations of each tensor; with `shared` to their first layer
    alone, so that the output stays. Experts of `shared` diverge without: they see other tokens.
    """
    about = source.about
    if about.moe.type != "dense":
        raise UserError(f"{source.where} has {about.moe.experts} experts already; see --grow")
    if experts < 2:
        raise UserError(f"--experts {experts}: a mixture has at least 2")
    if capacity is None:
        capacity = 1.0 if how == "shared" else float(experts)
    if not 0 < capacity <= experts:
        raise UserError(f"--capacity {capacity:g}: choose one up to the {experts} experts")
    ratio = about.model.mlp_ratio
    moe = about.moe.model_dump() | {
        "type": "diffmoe",
        "experts": experts,
        "every_block": every_block,
        "activation": about.model.mlp_activation,
        "capacity": capacity,
        "expert_ratio": ratio,
        "shared_expert_ratio": ratio if how == "shared" else 0.0,
        "shared_expert_activation": about.model.mlp_activation,
        # Scaled experts are right at their capacity alone, and the predictor knows nothing yet.
        "inference": "static" if how == "copies" and capacity < experts else "per_token",
    }
    if how == "copies":  # whose gates must sum to 1
        moe |= {"gate": "softmax", "gate_scale": 1.0}
    told = f"upcycled to {experts} experts ({how}, capacity {capacity:g}, noise {noise:g})"
    made = _changed(about, moe, told)
    network = empty_network(made.model, made.moe, device="meta")

    def read(name: str) -> Tensor:
        inside = re.fullmatch(r"(blocks\.\d+\.feed_forward)\.(.+)", name)
        if inside is None or name in source.shapes:
            return source.read(name)
        return _part_of_mixture(source, network, *inside.groups(), how, capacity, noise, seed)

    notes = (*source.notes, told, f"train with moe.capacity={capacity:g}")
    if how == "copies" and not noise and capacity == experts:
        notes += ("warning: equal experts that all see every token stay equal; add --noise 0.01",)
    return Source(
        source.where, made, expected_shapes(made.model, made.moe), read, run=source.run, notes=notes
    )


def _part_of_mixture(
    source: Source,
    network: DiT,
    layer: str,
    part: str,
    how: How,
    capacity: float,
    noise: float,
    seed: int,
) -> Tensor:
    """A tensor of the layer blocks.N.feed_forward, made of its dense MLP."""
    experts, name = network.moe_config.experts, f"{layer}.{part}"
    if part.startswith("shared_expert."):
        return source.read(f"{layer}.{part.removeprefix('shared_expert.')}")
    if part.endswith(".thresholds"):
        return torch.zeros(experts)
    if not part.startswith("experts."):
        return network.initial(name, seed)
    leaf = part.removeprefix("experts.")
    one = source.read(f"{layer}.{_OF_DENSE[network.moe_config.activation][leaf]}")
    one = one.t() if leaf.startswith("w_") else one
    if leaf.endswith("_out"):
        one = one * (0.0 if how == "shared" else experts / capacity)
    return _noisy(one.expand(experts, *one.shape), noise, seed, name)


def grow(source: Source, experts: int, noise: float = 0.0, seed: int = 0) -> Source:
    """A mixture with a multiple of its experts, each of them several times.

    The softmax halves the gates of a pair (of other gates the scale is halved), and at twice the
    capacity both take the same tokens, so the output stays, to rounding: per token and pooled by
    the copied predictor and thresholds, in training and `static` at the capacity that is set here.
    noise: added to the copies, not to the originals; without it a pair stays equal in training.
    Calibrated capacities do not come along.
    """
    about, old = source.about, source.about.moe.experts
    if about.moe.type == "dense":
        raise UserError(f"{source.where} is dense; see --upcycle")
    if experts < old:
        raise UserError(
            f"--experts {experts}: {source.where} has {old}. Fewer are refused: every expert has "
            "learned other tokens, and neither dropping nor averaging them keeps the output; take "
            "a lower capacity (tools/calibrate.py) to compute less"
        )
    if experts == old or experts % old:
        raise UserError(
            f"--experts {experts}: {source.where} has {old}; choose a multiple, such as {2 * old}"
        )
    times = experts // old
    moe = about.moe.model_dump() | {
        "experts": experts,
        "capacity": about.moe.capacity * times,
        "capacity_rounding": "exact",  # in floats K could be another one at the multiple
        "top_k": about.moe.top_k * times,
        "gate_scale": about.moe.gate_factor / (1 if about.moe.gate == "softmax" else times),
    }
    told = f"grown from {old} to {experts} experts (noise {noise:g})"
    made = _changed(about, moe, told)
    shapes = expected_shapes(made.model, made.moe)

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        if shapes[name] == source.shapes[name]:
            return tensor
        copies = tensor.repeat(times, *[1] * (tensor.dim() - 1))
        if not name.endswith(".thresholds"):
            copies[old:] = _noisy(copies[old:], noise, seed, name)
        return copies

    notes = (*source.notes, told, f"train with moe.capacity={made.moe.capacity:g}")
    if not noise:
        notes += ("warning: copies of an expert stay equal in training; add --noise 0.01",)
    return Source(source.where, made, shapes, read, run=source.run, notes=notes)


def _changed(about: Metadata, moe: dict, told: str) -> Metadata:
    made = about.provenance
    return about.replace(moe=moe, provenance={**made.model_dump(), "steps": (*made.steps, told)})


def _noisy(tensor: Tensor, noise: float, seed: int, name: str) -> Tensor:
    """noise: standard deviation, in those of the tensor."""
    if noise < 0 or not math.isfinite(noise):
        raise UserError(f"--noise {noise:g}: choose 0 or more, such as 0.01")
    if not noise:
        return tensor
    generator = keyed_generator(seed, "upcycling", name)
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
    return tensor + drawn * (noise * tensor.std())
