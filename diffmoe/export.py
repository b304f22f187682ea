"""Foreign state dicts: names and layouts of the paper's release, to ours."""

import re
from typing import Any

import torch
from torch import Tensor

from diffmoe.config import Config
from diffmoe.errors import UserError

_RELEASE_FAMILIES = {
    "DiffMoE": "diffmoe",
    "ECDiT": "expert_choice",
    "TCDiT": "token_choice",
    "DiT": "dense",
}

_RENAMES = [
    (r"^x_embedder\.proj\.", "patch_embed."),
    (r"^t_embedder\.mlp\.0\.", "timestep_embed.fc1."),
    (r"^t_embedder\.mlp\.2\.", "timestep_embed.fc2."),
    (r"^y_embedder\.embedding_table\.", "label_embed."),
    (r"^final_layer\.adaLN_modulation\.1\.", "final_adaln."),
    (r"^final_layer\.linear\.", "final."),
    (r"\.adaLN_modulation\.1\.", ".adaln."),
    (r"\.attn\.", ".attention."),
    (r"\.mlp\.gate_weight$", ".feed_forward.router"),
    (r"\.mlp\.gate\.weight$", ".feed_forward.router"),
    (r"\.mlp\.shared_experts\.", ".feed_forward.shared_expert."),
    (r"\.mlp\.capacity_predictor\.0\.", ".feed_forward.capacity_predictor.hidden."),
    (r"\.mlp\.capacity_predictor\.2\.", ".feed_forward.capacity_predictor.out."),
    (r"\.mlp\.expert_threshold$", ".feed_forward.capacity_predictor.thresholds"),
    (r"\.mlp\.", ".feed_forward."),
]

# The release's linear layer of one expert -> our stacked tensor. Matrices are transposed there.
_EXPERT_TENSORS = {
    "fc1.weight": "w_in",
    "fc1.bias": "b_in",
    "fc2.weight": "w_out",
    "fc2.bias": "b_out",
    "gate_proj.weight": "w_gate",
    "up_proj.weight": "w_up",
    "down_proj.weight": "w_out",
}


def config_from_release(family: str, options: dict[str, Any]) -> Config:
    """The configuration of a release model from its class name and its own option names."""
    if family not in _RELEASE_FAMILIES:
        raise UserError(
            f"release model {family!r} is unknown; known: {', '.join(_RELEASE_FAMILIES)}"
        )
    model = {
        "input_size": options["input_size"],
        "in_channels": options["in_channels"],
        "patch_size": options["patch_size"],
        "width": options["hidden_size"],
        "depth": options["depth"],
        "heads": options["num_heads"],
        "mlp_ratio": options["mlp_ratio"],
        "num_classes": options["num_classes"],
        "learn_sigma": options["learn_sigma"],
    }
    mixture = options.get("MoE_config", {})
    moe = {"type": _RELEASE_FAMILIES[family]}
    if mixture:
        # One shared expert of the release is an MLP of twice the usual hidden size.
        shared = 2 * options["mlp_ratio"] * (mixture["n_shared_experts"] or 0)
        moe |= {
            "experts": mixture["num_experts"],
            "capacity": mixture["capacity"],
            "every_block": not mixture["interleave"],
            "activation": "swiglu" if options.get("use_swiglu") else "gelu",
            "expert_ratio": options["mlp_ratio"],
            "shared_expert_ratio": shared,
            "top_k": mixture.get("num_experts_per_tok", 1),
            "capacity_loss_weight": options.get("CapacityPred_loss_weight", 0.01),
            "inference": "pooled",
        }
    return Config.model_validate(
        {"model": model, "moe": moe, "training": {"label_dropout": options["class_dropout_prob"]}}
    )


def from_release(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and stack a release state dict (or its gradients). Values are not changed.

    Left out because ours derives them: `pos_embed` and the threshold's decay.
    """
    converted: dict[str, Tensor] = {}
    experts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if name == "pos_embed" or name.endswith(".ema_decay"):
            continue
        match = re.fullmatch(r"(blocks\.\d+)\.mlp\.experts\.(\d+)\.(.+)", name)
        if match:
            leaf = _EXPERT_TENSORS[match[3]]
            stacked = f"{match[1]}.feed_forward.experts.{leaf}"
            tensor = tensor.t() if leaf.startswith("w_") else tensor
            experts.setdefault(stacked, {})[int(match[2])] = tensor
            continue
        for pattern, replacement in _RENAMES:
            renamed = re.sub(pattern, replacement, name)
            if renamed != name:
                name = renamed
                if pattern != r"\.adaLN_modulation\.1\.":
                    break
        converted[name] = tensor
    for name, parts in experts.items():
        if sorted(parts) != list(range(len(parts))):
            raise UserError(f"{name}: experts {sorted(parts)} are not numbered 0..{len(parts) - 1}")
        converted[name] = torch.stack([parts[index] for index in range(len(parts))])
    return converted
