"""The role of each parameter, by its module's type and place, and whether it decays."""

from typing import NamedTuple

from torch import nn

from diffmoe.models.alignment import Projector
from diffmoe.models.blocks import MLP, Attention, Block, CrossAttention, SwiGLU, TimestepEmbedder
from diffmoe.models.capacity_predictor import CapacityPredictor
from diffmoe.models.dit import DiT
from diffmoe.models.experts import Experts
from diffmoe.models.families.race import ExpertRace
from diffmoe.models.lora import weight_of
from diffmoe.models.moe import MoEFeedForward
from diffmoe.models.text_embedding import TextEmbedder
from diffmoe.models.wide_head import WideHead


class Role(NamedTuple):
    """name: a field of `RateMultipliers`. decays: whether weight decay acts on it."""

    name: str
    decays: bool


# Of all parameters inside of a module; the outermost that has a role gives it.
_BY_TYPE: dict[type[nn.Module], str] = {
    nn.Embedding: "embedding",
    TimestepEmbedder: "embedding",
    TextEmbedder: "text",
    Attention: "attention",
    CrossAttention: "attention",
    MLP: "mlp",
    SwiGLU: "mlp",
    Experts: "experts",
    CapacityPredictor: "predictor",
    Projector: "projector",
}
# Of what a module calls so.
_BY_PLACE: dict[type[nn.Module], dict[str, str]] = {
    DiT: {"patch_embed": "embedding", "final": "final", "final_adaln": "modulation"},
    Block: {"adaln": "modulation"},
    WideHead: {"patch_embed": "embedding", "project": "modulation"},
    ExpertRace: {"target_head": "final"},
}
# Not biases, gains of norms, rows of tables and learned vectors, whatever their shape.
_MATRICES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("weight",),
    nn.Conv2d: ("weight",),
    Experts: Experts.matrices,
}
_NEVER_DECAY = ("embedding", "router")


def roles(network: DiT) -> dict[str, Role]:
    """By name, of every parameter. Raises TypeError naming one that has no role."""
    return {name: _role(network, name) for name, _ in network.named_parameters()}


def _role(network: DiT, name: str) -> Role:
    *path, last = name.split(".")
    owner: nn.Module = network
    role = None
    for part in path:
        inner: nn.Module = getattr(owner, part)
        role = role or _BY_TYPE.get(type(inner)) or _by_place(owner, part)
        owner = inner
    role = role or _by_place(owner, last)
    if role is None:
        raise TypeError(f"{type(owner).__name__}: its parameter {name} has no role")
    is_matrix = weight_of(last) in _MATRICES.get(type(owner), ())
    return Role(role, role not in _NEVER_DECAY and is_matrix)


def _by_place(owner: nn.Module, part: str) -> str | None:
    if isinstance(owner, MoEFeedForward) and part in owner.routing_parts:
        return "router"
    return _BY_PLACE.get(type(owner), {}).get(part)
