"""The release's networks, said again as plainly as possible: names, shapes, and the forward.

Written from the release's options alone, token by token where that is plain, so that an error of
ours is not made twice. tests/conversion/test_release_options.py holds it against tests/reference.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = dict[str, Tensor]


def shapes_of(family: str, options: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the release's state dict. family: DiffMoE, ECDiT, TCDiT or DiT."""
    D, patch, channels = options["hidden_size"], options["patch_size"], options["in_channels"]
    inner = options["num_heads"] * (options.get("head_dim") or D // options["num_heads"])
    out = channels * (2 if options["learn_sigma"] else 1)
    tokens = (options["input_size"] // patch) ** 2
    rows = options["num_classes"] + (options["class_dropout_prob"] > 0)
    shapes: dict[str, tuple[int, ...]] = {"pos_embed": (1, tokens, D)}
    linear(shapes, "x_embedder.proj", D, channels, patch, patch)
    linear(shapes, "t_embedder.mlp.0", D, 256)
    linear(shapes, "t_embedder.mlp.2", D, D)
    shapes["y_embedder.embedding_table.weight"] = (rows, D)
    for i in range(options["depth"]):
        block = f"blocks.{i}"
        linear(shapes, f"{block}.attn.qkv", 3 * inner, D)
        linear(shapes, f"{block}.attn.proj", D, inner)
        linear(shapes, f"{block}.adaLN_modulation.1", 6 * D, D)
        if is_mixture(family, options, i):
            mixture(shapes, f"{block}.mlp", family, options)
        else:
            mlp(shapes, f"{block}.mlp", D, int(D * options["mlp_ratio"]), swiglu(options))
    linear(shapes, "final_layer.linear", patch * patch * out, D)
    linear(shapes, "final_layer.adaLN_modulation.1", 2 * D, D)
    return shapes


def is_mixture(family: str, options: dict[str, Any], block: int) -> bool:
    return family != "DiT" and (block % 2 == 1 or not options["MoE_config"]["interleave"])


def swiglu(options: dict[str, Any]) -> bool:
    return bool(options.get("use_swiglu"))


def linear(shapes: dict, name: str, *weight: int) -> None:
    shapes |= {f"{name}.weight": weight, f"{name}.bias": weight[:1]}


def mlp(shapes: dict, name: str, width: int, hidden: int, gated: bool) -> None:
    if gated:
        shapes |= {f"{name}.{part}_proj.weight": (hidden, width) for part in ("gate", "up")}
        shapes[f"{name}.down_proj.weight"] = (width, hidden)
    else:
        linear(shapes, f"{name}.fc1", hidden, width)
        linear(shapes, f"{name}.fc2", width, hidden)


def mixture(shapes: dict, name: str, family: str, options: dict[str, Any]) -> None:
    D, moe = options["hidden_size"], options["MoE_config"]
    experts, shared = moe["num_experts"], moe["n_shared_experts"]
    for e in range(experts):
        hidden = int(D * options["mlp_ratio"])
        mlp(shapes, f"{name}.experts.{e}", D, hidden, swiglu(options))
    shapes[f"{name}.gate.weight" if family == "TCDiT" else f"{name}.gate_weight"] = (experts, D)
    if family == "DiffMoE":
        linear(shapes, f"{name}.capacity_predictor.0", D, D)
        linear(shapes, f"{name}.capacity_predictor.2", experts, D)
        shapes |= {f"{name}.expert_threshold": (experts,), f"{name}.ema_decay": (1,)}
    if shared:  # of DiffMoE always of this size and kind, of the others a gated one
        hidden = 8 * D if family == "DiffMoE" else shared * D
        mlp(shapes, f"{name}.shared_experts", D, hidden, family != "DiffMoE")


def random_state(family: str, options: dict[str, Any], seed: int = 0) -> State:
    """Weights in which no zero hides an error; thresholds that let about half of the pairs in."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shapes_of(family, options)
    state = {name: torch.randn(size, generator=generator) * 0.15 for name, size in shapes.items()}
    for name in state:
        if name.endswith("expert_threshold"):
            state[name] = torch.full(shapes[name], 0.5)
        elif name.endswith("ema_decay"):
            state[name] = torch.tensor([0.95])
    state["pos_embed"] = positions(options["hidden_size"], math.isqrt(shapes["pos_embed"][1]))
    return state


def positions(width: int, grid: int) -> Tensor:
    """The fixed table: for each token sines and cosines of its column, then of its row."""
    table = torch.zeros(1, grid * grid, width, dtype=torch.float64)
    quarter = width // 4
    for token in range(grid * grid):
        for k in range(quarter):
            for offset, place in ((0, token % grid), (2 * quarter, token // grid)):
                angle = place / 10000 ** (k / quarter)
                table[0, token, offset + k] = math.sin(angle)
                table[0, token, offset + quarter + k] = math.cos(angle)
    return table.float()


def forward(
    family: str, options: dict[str, Any], state: State, x: Tensor, t: Tensor, y: Tensor
) -> Tensor:
    """The prediction in evaluation mode, (B, C or 2C, H, W)."""
    patch, heads = options["patch_size"], options["num_heads"]
    weight, bias = (state[f"x_embedder.proj.{leaf}"] for leaf in ("weight", "bias"))
    tokens = F.conv2d(x, weight, bias, stride=patch).flatten(2).transpose(1, 2)
    tokens = tokens + state["pos_embed"]
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = t[:, None] * frequencies
    waves = torch.cat([angles.cos(), angles.sin()], dim=1)
    hidden = F.silu(through(state, "t_embedder.mlp.0", waves))
    condition = through(state, "t_embedder.mlp.2", hidden)
    condition = F.silu(condition + state["y_embedder.embedding_table.weight"][y])
    for i in range(options["depth"]):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = through(
            state, f"{name}.adaLN_modulation.1", condition
        )[:, None].chunk(6, dim=2)
        tokens = tokens + gate1 * attention(state, name, normal(tokens, shift1, scale1), heads)
        h = normal(tokens, shift2, scale2)
        if is_mixture(family, options, i):
            tokens = tokens + gate2 * mix(family, options, state, f"{name}.mlp", h)
        else:
            tokens = tokens + gate2 * through_mlp(state, f"{name}.mlp", h)
    shift, scale = through(state, "final_layer.adaLN_modulation.1", condition)[:, None].chunk(2, 2)
    patches = through(state, "final_layer.linear", normal(tokens, shift, scale))
    side = math.isqrt(patches.shape[1])
    image = patches.view(len(x), side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return image.reshape(len(x), -1, side * patch, side * patch)


def through(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def normal(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def through_mlp(state: State, name: str, x: Tensor) -> Tensor:
    if f"{name}.fc1.weight" in state:
        hidden = F.gelu(through(state, f"{name}.fc1", x), approximate="tanh")
        return through(state, f"{name}.fc2", hidden)
    gate, up, down = (state[f"{name}.{part}_proj.weight"].T for part in ("gate", "up", "down"))
    return (F.silu(x @ gate) * (x @ up)) @ down


def attention(state: State, block: str, x: Tensor, heads: int) -> Tensor:
    batch, tokens, _ = x.shape
    query, key, value = (
        part.view(batch, tokens, heads, -1).transpose(1, 2)
        for part in through(state, f"{block}.attn.qkv", x).chunk(3, dim=2)
    )
    weights = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).softmax(dim=-1)
    return through(state, f"{block}.attn.proj", (weights @ value).transpose(1, 2).flatten(2))


def mix(family: str, options: dict[str, Any], state: State, name: str, h: Tensor) -> Tensor:
    moe, (_, tokens, width) = options["MoE_config"], h.shape
    router = state[f"{name}.gate.weight" if family == "TCDiT" else f"{name}.gate_weight"]
    x = h.reshape(-1, width)
    scores = (x @ router.T).softmax(dim=1)
    taken = torch.zeros_like(scores, dtype=torch.bool)
    if family == "TCDiT":
        for s in range(len(x)):
            taken[s, scores[s].topk(moe["capacity"]).indices] = True
    elif family == "ECDiT":
        k = int(tokens / moe["num_experts"] * moe["capacity"])
        for first in range(0, len(x), tokens):
            for e in range(moe["num_experts"]):
                taken[first + scores[first : first + tokens, e].topk(k).indices, e] = True
    else:
        hidden = F.silu(through(state, f"{name}.capacity_predictor.0", x))
        wanted = through(state, f"{name}.capacity_predictor.2", hidden).sigmoid()
        for e, threshold in enumerate(state[f"{name}.expert_threshold"]):
            count = int((wanted[:, e] > threshold).sum())
            taken[scores[:, e].topk(count).indices, e] = True
    y = torch.zeros_like(x)
    for e in range(moe["num_experts"]):
        rows = taken[:, e]
        y[rows] += scores[rows, e, None] * through_mlp(state, f"{name}.experts.{e}", x[rows])
    if moe["n_shared_experts"]:
        y = y + through_mlp(state, f"{name}.shared_experts", x)
    return y.view_as(h)
