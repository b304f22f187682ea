"""Weights of a model for a network that differs from it: what fits is taken, the rest starts anew.

Tensors of the same name and shape are taken as they are. Class rows follow their names, experts are
multiplied, cut or made of a dense MLP; conditions, patches and outputs of another kind start anew.
What a network is built of (width, depth, attention, expert sizes) must agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffmoe.config import Config, ModelConfig
from diffmoe.conversion.upcycling import How, grow, upcycle
from diffmoe.errors import UserError
from diffmoe.export.sources import Source
from diffmoe.export.tensors import Shapes, expected_shapes, meta_network
from diffmoe.models.moe import ROUTING_STATE

_BACKBONE = (
    *("width", "depth", "heads", "width_of_head", "mlp_ratio", "mlp_activation"),
    *("qk_norm", "rope"),
)
_EXPERT = ("expert_ratio", "shared_expert_ratio", "activation", "every_block")
_LABELS = "label_embed.weight"
_FINAL = ("final.weight", "final.bias")


@dataclass(frozen=True)
class Adapted:
    """read: gives a tensor of the new network by name. fresh: names that it does not have, and
    that keep their initial values. partly: names of those that start anew in some rows. notes: a
    line for each difference.
    """

    read: Callable[[str], Tensor]
    fresh: frozenset[str]
    partly: frozenset[str]
    notes: tuple[str, ...]


def adapt(source: Source, config: Config, class_names: Sequence[str] | None = None) -> Adapted:
    """The weights of `source` for the network of `config`; reads no tensors yet.

    class_names: of config's data, where it names its classes. Raises UserError naming the settings
    that must be as in the source.
    """
    _check_structure(source, config)
    source, notes = _with_experts(source, config)
    there, now = source.metadata.model, config.model
    wanted = expected_shapes(now, config.moe)
    special: dict[str, Callable[[str], Tensor]] = {}
    fresh: set[str] = set()
    partly: set[str] = set()

    if there.input_size != now.input_size or there.patch_size != now.patch_size:
        notes.append(f"size: {_patches(there)} there, {_patches(now)} here: new positions")
    if now.rope and there.rotary_grid != now.rotary_grid:
        notes.append(
            f"rotary angles: made for {_tokens(there.rotary_grid)} there, for "
            f"{_tokens(now.rotary_grid)} here: attention changes"
        )
    elif now.rope and there.grid != now.grid:
        notes.append(
            f"rotary angles: made for {_tokens(now.rotary_grid)}, over which {_tokens(now.grid)} "
            "are spread"
        )
    if (there.in_channels, there.patch_size) != (now.in_channels, now.patch_size):
        fresh |= {name for name in wanted if "patch_embed." in name} | set(_FINAL)
        notes.append(
            f"patches: {there.in_channels} channels there, {now.in_channels} here: the first and "
            "the last layer start anew"
            if there.patch_size == now.patch_size
            else "patches of another size: the first and the last layer start anew"
        )
    elif there.learn_sigma != now.learn_sigma:
        special |= {name: _other_outputs(source, config, wanted) for name in _FINAL}
        partly |= set(_FINAL) if now.learn_sigma else set()
        notes.append(
            "the predicted variance is left out"
            if there.learn_sigma
            else "the predicted variance starts at zero"
        )
    if there.wide_head != now.wide_head:
        fresh |= {name for name in wanted if name.startswith(("wide_head.", "final"))}
        notes.append(
            f"wide head: {_wide_head(there)} there, {_wide_head(now)} here: "
            f"{'the last layer starts' if now.wide_head is None else 'it and the last layer start'}"
            " anew"
        )
    objectives = source.metadata.diffusion.objective, config.diffusion.objective
    if objectives[0] != objectives[1]:
        notes.append(f"objective: {objectives[0]} there, {objectives[1]} here: weights alone fit")

    if there.text != now.text:
        fresh |= {name for name in wanted if name.startswith("text_embed.")}
        notes.append(f"condition: {_condition(there)} there, {_condition(now)} here")
    if now.text is None and there.text is None:
        rows = _class_rows(source, config, class_names)
        if rows is not None:
            special[_LABELS] = _labels(source, config, rows)
            partly |= {_LABELS} if len(rows) < now.num_classes else set()
            notes.append(
                f"classes: {len(rows)} of {now.num_classes} known by name, the others start anew"
                if rows
                else f"classes: {there.num_classes} there, {now.num_classes} here, not known by "
                "name: their rows start anew"
            )

    other = {name for name in wanted if source.shapes.get(name) != wanted[name]}
    other -= fresh | special.keys()
    odd = sorted(other & source.shapes.keys() - _of_routing(other))
    if odd:
        raise UserError(
            f"{source.where} does not fit the network: {odd[0]} has the shape "
            f"{source.shapes[odd[0]]}, not {wanted[odd[0]]}"
        )
    parameters = {name for name in other if not name.endswith(ROUTING_STATE)}
    if parameters:
        notes.append(f"start anew: {_parts(parameters)}")

    def read(name: str) -> Tensor:
        return special.get(name, source.read)(name)

    return Adapted(read, frozenset(fresh | other), frozenset(partly), tuple(notes))


def _of_routing(names: set[str]) -> set[str]:
    """Those of MoE layers but the experts'; other families have them in other shapes."""
    return {name for name in names if ".feed_forward." in name and ".experts." not in name}


def _check_structure(source: Source, config: Config) -> None:
    there, now = source.metadata.model, config.model
    wanted: dict[str, Any] = {}
    for key in _BACKBONE:
        if getattr(there, key) != getattr(now, key):
            name = "head_width" if key == "width_of_head" else key
            wanted[f"model.{name}"] = getattr(there, key)
    experts_there, experts_now = source.metadata.moe, config.moe
    if experts_there.type != "dense":
        if experts_now.type == "dense":
            wanted["moe.type"] = experts_there.type
        for key in _EXPERT:
            if getattr(experts_there, key) != getattr(experts_now, key):
                wanted[f"moe.{key}"] = getattr(experts_there, key)
        if wanted and experts_there.experts != experts_now.experts:
            wanted["moe.experts"] = experts_there.experts
    if wanted:
        settings = " ".join(f"{key}={_yaml(value)}" for key, value in wanted.items())
        raise UserError(f"{source.where} has another structure than this run; set {settings}")


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _with_experts(source: Source, config: Config) -> tuple[Source, list[str]]:
    """With as many experts as the network, and what was done for that."""
    there, now = source.metadata.moe, config.moe
    if now.type == "dense" or there.type == "dense" == now.type:
        return source, []
    if there.type == "dense":
        made = upcycle(
            source,
            now.experts,
            now.every_block,
            _how(source, config),
            now.capacity,
            seed=config.seed,
        )
        return made, [f"dense there: {made.metadata.provenance.steps[-1]}"]
    notes = []
    if there.type != now.type:
        notes.append(f"routing: {there.type} there, {now.type} here")
    if there.gate != now.gate or there.gate_factor != now.gate_factor:
        notes.append(
            f"gates: {there.gate} times {there.gate_factor:g} there, {now.gate} times "
            f"{now.gate_factor:g} here: the outputs change"
        )
    if now.experts > there.experts:
        source = grow(source, now.experts)
        notes.append(
            f"experts: {there.experts} there, {now.experts} here: copies; at moe.capacity="
            f"{source.metadata.moe.capacity:g} moe.gate_scale={source.metadata.moe.gate_factor:g} "
            "the output is that of before"
        )
    elif now.experts < there.experts:
        source = _first_experts(source, config)
        notes.append(
            f"experts: the first {now.experts} of {there.experts} are taken, and the output changes"
        )
    return source, notes


def _how(source: Source, config: Config) -> How:
    """Raises UserError where the run's experts cannot be made of the dense MLP."""
    ratio, moe = source.metadata.model.mlp_ratio, config.moe
    activation = source.metadata.model.mlp_activation
    fits = moe.expert_ratio == ratio and moe.activation == activation
    if fits and moe.shared_expert_ratio == ratio and moe.shared_expert_activation == activation:
        return "shared"
    if fits and not moe.shared_expert_ratio and moe.gate == "softmax" and moe.gate_factor == 1:
        return "copies"
    raise UserError(
        f"{source.where} is dense, and its MLPs do not fit these experts; set moe.expert_ratio="
        f"{ratio:g} moe.activation={activation} moe.shared_expert_activation={activation} "
        f"moe.shared_expert_ratio={ratio:g} (the dense MLP goes on beside the experts), or "
        "moe.shared_expert_ratio=0 moe.gate=softmax (each expert is a copy of it)"
    )


def _first_experts(source: Source, config: Config) -> Source:
    number = config.moe.experts
    moe = source.metadata.moe.model_dump() | {"experts": number}
    moe |= {key: min(moe[key], number) for key in ("capacity", "top_k")}
    metadata = source.metadata.replace(moe=moe)
    shapes = expected_shapes(metadata.model, metadata.moe)

    def read(name: str) -> Tensor:
        tensor = source.read(name)
        return tensor if tuple(tensor.shape) == shapes[name] else tensor[:number]

    return replace(source, metadata=metadata, shapes=shapes, read=read)


def _class_rows(
    source: Source, config: Config, class_names: Sequence[str] | None
) -> dict[int, int] | None:
    """Which class of the source each known class is; None if all are the same ones."""
    names, there, now = source.metadata.class_names, source.metadata.model, config.model
    if names and class_names:
        if names == tuple(class_names):
            return None
        return {row: names.index(name) for row, name in enumerate(class_names) if name in names}
    return None if there.num_classes == now.num_classes else {}


def _labels(source: Source, config: Config, rows: dict[int, int]) -> Callable[[str], Tensor]:
    """Rows of known classes and of the null label, others as they start."""

    def read(name: str) -> Tensor:
        made = meta_network(config.model, config.moe).initial_value(name, config.seed)
        found = source.read(name)
        made[-1] = found[-1]
        for row, old in rows.items():
            made[row] = found[old]
        return made

    return read


def _other_outputs(source: Source, config: Config, wanted: Shapes) -> Callable[[str], Tensor]:
    """The last layer with or without the channels of the variance, which are a patch's last."""

    def read(name: str) -> Tensor:
        found, squares = source.read(name), config.model.patch_size**2
        made = torch.zeros(wanted[name])
        channels = config.model.in_channels
        made.view(squares, -1, *made.shape[1:])[:, :channels] = found.view(
            squares, -1, *found.shape[1:]
        )[:, :channels]
        return made

    return read


def _patches(model: Any) -> str:
    _, height, width = model.latent_shape
    return f"{height}x{width} in patches of {model.patch_size}"


def _wide_head(model: ModelConfig) -> str:
    head = model.wide_head
    return "none" if head is None else f"{head.depth} of width {head.width}, {head.heads} heads"


def _tokens(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]} tokens"


def _condition(model: Any) -> str:
    return "classes" if model.text is None else f"captions ({model.text.encoder})"


def _parts(names: set[str]) -> str:
    """Names by their last module, such as cross_attention (24 tensors)."""
    counts: dict[str, int] = {}
    for name in names:
        parts = [part for part in name.split(".")[:-1] if not part.isdigit() and part != "blocks"]
        part = ".".join(parts[:2]) or name
        counts[part] = counts.get(part, 0) + 1
    return ", ".join(f"{part} ({count} tensors)" for part, count in sorted(counts.items()))
