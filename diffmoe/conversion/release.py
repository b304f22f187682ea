"""Tensors of the paper's release, of facebookresearch/DiT and of SiT: to ours and back.

The three have the same names; the latter two are dense. What they store and we compute, such as
`pos_embed`, is not a tensor here.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

from diffmoe.config import Config, ModelConfig, MoEConfig
from diffmoe.conversion.layouts import Layout, same, stacked, without_last_row
from diffmoe.errors import UserError
from diffmoe.export.tensors import Shapes, expected_shapes

_FAMILIES = {
    "DiffMoE": "diffmoe",
    "ECDiT": "expert_choice",
    "TCDiT": "token_choice",
    "DiT": "dense",
}

# Their prefix -> ours, of everything but experts. Then ".weight" or ".bias" follows.
_TOP = {
    "x_embedder.proj": "patch_embed",
    "t_embedder.mlp.0": "timestep_embed.fc1",
    "t_embedder.mlp.2": "timestep_embed.fc2",
    "y_embedder.embedding_table": "label_embed",
    "final_layer.adaLN_modulation.1": "final_adaln",
    "final_layer.linear": "final",
}
_IN_BLOCK = {
    "adaLN_modulation.1": "adaln",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "mlp.fc1": "feed_forward.fc1",
    "mlp.fc2": "feed_forward.fc2",
    "mlp.gate_proj": "feed_forward.gate",
    "mlp.up_proj": "feed_forward.up",
    "mlp.down_proj": "feed_forward.down",
    "mlp.shared_experts.fc1": "feed_forward.shared_expert.fc1",
    "mlp.shared_experts.fc2": "feed_forward.shared_expert.fc2",
    "mlp.shared_experts.gate_proj": "feed_forward.shared_expert.gate",
    "mlp.shared_experts.up_proj": "feed_forward.shared_expert.up",
    "mlp.shared_experts.down_proj": "feed_forward.shared_expert.down",
    "mlp.capacity_predictor.0": "feed_forward.capacity_predictor.hidden",
    "mlp.capacity_predictor.2": "feed_forward.capacity_predictor.out",
}
# Complete names in a block. Token choice has its router in a submodule.
_ROUTER, _ROUTER_OF_TOKEN_CHOICE = "mlp.gate_weight", "mlp.gate.weight"
_WHOLE = {
    _ROUTER: "feed_forward.router",
    _ROUTER_OF_TOKEN_CHOICE: "feed_forward.router",
    "mlp.expert_threshold": "feed_forward.capacity_predictor.thresholds",
}
# One expert's linear layer -> our stacked tensor. Theirs are (out, in), ours (in, out).
_EXPERT = {
    "fc1.weight": "w_in",
    "fc1.bias": "b_in",
    "fc2.weight": "w_out",
    "fc2.bias": "b_out",
    "gate_proj.weight": "w_gate",
    "up_proj.weight": "w_up",
    "down_proj.weight": "w_out",
}
_IMAGENET = 1000  # classes of the published models, which have a null label
# Attention heads of the published widths, S to XL.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


def config_from_release(family: str, options: dict[str, Any]) -> Config:
    """The configuration of a release model, from its class name and options.

    family: DiffMoE, ECDiT, TCDiT or DiT. options: by the release's names. Raises UserError for an
    option that we do not have.
    """
    if family not in _FAMILIES:
        raise UserError(f"release model {family!r} is unknown; known: {', '.join(_FAMILIES)}")
    activation = "swiglu" if options.get("use_swiglu") else "gelu"
    model = {
        "input_size": options["input_size"],
        "in_channels": options["in_channels"],
        "patch_size": options["patch_size"],
        "width": options["hidden_size"],
        "depth": options["depth"],
        "heads": options["num_heads"],
        "head_width": options.get("head_dim"),
        "mlp_ratio": options["mlp_ratio"],
        "num_classes": options["num_classes"],
        "learn_sigma": options["learn_sigma"],
    }
    mixture = options.get("MoE_config", {})
    if family == "DiT" or mixture["interleave"]:
        model["mlp_activation"] = activation
    moe: dict[str, Any] = {"type": _FAMILIES[family]}
    if family != "DiT":
        if mixture.get("capacity_schedule"):
            raise UserError(
                "MoE_config.capacity_schedule: a capacity that changes during training cannot be "
                "trained with here; set moe.capacity to its last value. Weights that were trained "
                "with it can be converted"
            )
        token_choice = family == "TCDiT"
        shared = mixture["n_shared_experts"] or 0
        moe |= {
            "experts": mixture["num_experts"],
            # For token choice, its `capacity` is k; num_experts_per_tok is not used there.
            "capacity": 1.0 if token_choice else mixture["capacity"],
            "top_k": mixture["capacity"] if token_choice else 1,
            "every_block": not mixture["interleave"],
            "activation": activation,
            "expert_init_std": 0.006 if mixture.get("init_MoeMLP") else None,
            "expert_ratio": options["mlp_ratio"],
            # The release's DiffMoE has one of this size, whatever the number.
            "shared_expert_ratio": 8.0 * bool(shared) if family == "DiffMoE" else float(shared),
            "shared_expert_activation": "swiglu" if shared and family != "DiffMoE" else "gelu",
            "capacity_loss_weight": options.get("CapacityPred_loss_weight", 0.01),
            "inference": "pooled",
            "capacity_rounding": "release",
        }
    return Config.model_validate(
        {"model": model, "moe": moe, "training": {"label_dropout": options["class_dropout_prob"]}}
    )


def label_rows(shapes: Shapes) -> int:
    """Rows of the label table: one per class, and with label dropout one for the null label."""
    return _shape(shapes, "y_embedder.embedding_table.weight", 2)[0]


def sections_from_shapes(
    shapes: Shapes,
    num_classes: int | None,
    heads: int | None,
    input_size: int | None,
    capacity: float,
    top_k: int,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The model and moe sections of a configuration, from tensors and what they cannot show.

    num_classes: None: ImageNet's, if the label table fits. heads: None: those of a published width.
    input_size: None: from pos_embed. capacity, top_k: of training. Raises UserError naming the
    tensor or option that is missing.
    """
    width, channels, patch, _ = _shape(shapes, "x_embedder.proj.weight", 4)
    blocks = [int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))]
    inner = _shape(shapes, "blocks.0.attn.proj.weight", 2)[1]
    outputs, _ = _shape(shapes, "final_layer.linear.weight", 2)
    if heads is None:
        if width not in HEADS:
            raise UserError(
                "the tensors do not show the number of attention heads, and the width "
                f"{width} is not a published one ({', '.join(map(str, HEADS))}); give "
                "--heads N"
            )
        heads = HEADS[width]
        if inner != width:
            raise UserError(
                f"blocks.0.attn.proj.weight takes {inner} channels for a width of {width}, so "
                "head_dim was set and the number of heads is unknown; give --heads N"
            )
    if heads < 1 or inner % heads:
        raise UserError(
            f"blocks.0.attn.proj.weight takes {inner} channels, which is not divisible by "
            f"{heads} heads; give --heads N"
        )
    if input_size is None:
        if "pos_embed" not in shapes:
            raise UserError("without pos_embed the input size is unknown; give --input-size N")
        input_size = round(_shape(shapes, "pos_embed", 3)[1] ** 0.5) * patch
    model = {
        "input_size": input_size,
        "in_channels": channels,
        "patch_size": patch,
        "width": width,
        "depth": max(blocks, default=-1) + 1,
        "heads": heads,
        "head_width": None if inner == width else inner // heads,
        "num_classes": _classes(label_rows(shapes), num_classes),
        "learn_sigma": outputs == 2 * channels * patch**2,
    }
    ratio, activation = _mlp(shapes, "mlp", width)
    if ratio:
        model |= {"mlp_ratio": ratio, "mlp_activation": activation}
    return model, _mixture(shapes, width, capacity, top_k)


def _classes(rows: int, given: int | None) -> int:
    """The number of classes of a label table. given: by the user, or in the weights' file."""
    if given is None and rows == _IMAGENET + 1:
        return _IMAGENET
    if given is None:
        raise UserError(
            f"its label table has {rows} rows: {rows - 1} classes and the null label, or {rows} "
            "classes if it was trained without label dropout; give --num-classes N"
        )
    if given not in (rows - 1, rows) or given < 1:
        raise UserError(
            f"its label table has {rows} rows, which do not fit {given} classes; give "
            f"--num-classes {rows - 1}, or {rows} if it was trained without label dropout"
        )
    return given


def _mixture(shapes: Shapes, width: int, capacity: float, top_k: int) -> dict[str, Any]:
    numbered = {
        name: found
        for name in shapes
        if (found := re.match(r"blocks\.(\d+)\.mlp\.experts\.(\d+)\.(.+)", name))
    }
    if not numbered:
        return {"type": "dense"}
    leaves = {found[3]: name for name, found in numbered.items()}
    swiglu = "gate_proj.weight" in leaves
    hidden = _shape(shapes, leaves.get("gate_proj.weight" if swiglu else "fc1.weight", ""), 2)[0]
    family = "expert_choice"
    if any(name.endswith(_ROUTER_OF_TOKEN_CHOICE) for name in shapes):
        family = "token_choice"
    elif any(".mlp.capacity_predictor." in name for name in shapes):
        family = "diffmoe"
    shared, shared_activation = _mlp(shapes, "mlp.shared_experts", width)
    return {
        "type": family,
        "experts": max(int(found[2]) for found in numbered.values()) + 1,
        "every_block": any(found[1] == "0" for found in numbered.values()),
        "capacity": capacity,
        "activation": "swiglu" if swiglu else "gelu",
        "expert_ratio": _ratio(hidden, width),
        "shared_expert_ratio": shared,
        "shared_expert_activation": shared_activation,
        "top_k": top_k,
        "inference": "pooled",
        "capacity_rounding": "release",
    }


def _mlp(shapes: Shapes, name: str, width: int) -> tuple[float, str]:
    """Hidden size / width, and activation, of the first such MLP of a block; 0 if there is none."""
    for activation, first in (("gelu", "fc1"), ("swiglu", "gate_proj")):
        found = re.compile(rf"blocks\.\d+\.{re.escape(name)}\.{first}\.weight")
        weight = next((n for n in shapes if found.fullmatch(n)), None)
        if weight:
            return _ratio(_shape(shapes, weight, 2)[0], width), activation
    return 0.0, "gelu"


def _ratio(hidden: int, width: int) -> float:
    """A ratio with int(width * ratio) == hidden."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _shape(shapes: Shapes, name: str, sides: int) -> tuple[int, ...]:
    if len(shapes.get(name, ())) != sides:
        found = f"has the shape {shapes[name]}" if name in shapes else "is missing"
        raise UserError(f"{name or 'the first matrix of the experts'} {found}")
    return shapes[name]


def release_layout(model: ModelConfig, moe: MoEConfig, null_row: bool = True) -> Layout:
    """The layout of a network. Raises UserError for one that the release cannot represent.

    null_row: whether their label table has the null label, as with label dropout.
    """
    strange = [key for key in ("qk_norm", "rope") if getattr(model, key)]
    if strange:
        raise UserError(f"model.{strange[0]}=true: the release's networks do not have it")
    if moe.type != "dense":
        for key, theirs in (("gate", "softmax"), ("gate_factor", 1), ("router_input", "modulated")):
            if getattr(moe, key) != theirs:
                raise UserError(
                    f"moe.{key}={getattr(moe, key)}: the release's networks support only {theirs}"
                )
    prefixes = {ours: theirs for theirs, ours in _TOP.items()}
    in_block = {ours: theirs for theirs, ours in (_IN_BLOCK | _WHOLE).items()}
    in_block["feed_forward.router"] = (
        _ROUTER_OF_TOKEN_CHOICE if moe.type == "token_choice" else _ROUTER
    )
    linear = {
        ours: theirs
        for theirs, ours in _EXPERT.items()
        if ours != "w_out" or (theirs == "down_proj.weight") == (moe.activation == "swiglu")
    }
    layout: Layout = {}
    for name in expected_shapes(model, moe):
        if name == "label_embed.weight" and not null_row:
            layout[name] = without_last_row(f"{prefixes['label_embed']}.weight")
            continue
        block = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
        if block is None:
            prefix, _, leaf = name.rpartition(".")
            layout[name] = same(f"{prefixes[prefix]}.{leaf}")
        elif ".experts." in name:
            leaf = name.rpartition(".")[2]
            layout[name] = stacked(
                [f"{block[1]}.mlp.experts.{i}.{linear[leaf]}" for i in range(moe.experts)],
                transposed=leaf.startswith("w_"),
            )
        elif block[2] in in_block:
            layout[name] = same(f"{block[1]}.{in_block[block[2]]}")
        else:
            prefix, _, leaf = block[2].rpartition(".")
            layout[name] = same(f"{block[1]}.{in_block[prefix]}.{leaf}")
    return layout


def from_release(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and stack any part of a release state dict (or gradients of one).

    Raises UserError for an unknown name, or experts that are not numbered 0, 1, 2, ...
    """
    converted: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if is_derived(name):
            continue
        match = re.fullmatch(r"(blocks\.\d+)\.mlp\.experts\.(\d+)\.(.+)", name)
        if match and match[3] in _EXPERT:
            leaf = _EXPERT[match[3]]
            tensor = tensor.t() if leaf.startswith("w_") else tensor
            stack = experts.setdefault(f"{match[1]}.feed_forward.experts.{leaf}", {})
            stack[int(match[2])] = tensor
        else:
            converted[_our_name(name)] = tensor
    for name, parts in experts.items():
        if sorted(parts) != list(range(len(parts))):
            raise UserError(f"{name}: experts {sorted(parts)} are not numbered 0..{len(parts) - 1}")
        converted[name] = torch.stack([parts[index] for index in range(len(parts))])
    return converted


def is_derived(name: str) -> bool:
    """Whether it is a tensor that the release stores and we compute from the configuration."""
    return name == "pos_embed" or name.endswith(".mlp.ema_decay")


def _our_name(name: str) -> str:
    block = re.fullmatch(r"(blocks\.\d+)\.(.+)", name)
    if block is not None and block[2] in _WHOLE:
        return f"{block[1]}.{_WHOLE[block[2]]}"
    prefix, _, leaf = (block[2] if block else name).rpartition(".")
    table = _IN_BLOCK if block else _TOP
    if prefix not in table:
        raise UserError(f"{name} is not a tensor of the release's networks")
    return f"{block[1]}.{table[prefix]}.{leaf}" if block else f"{table[prefix]}.{leaf}"
