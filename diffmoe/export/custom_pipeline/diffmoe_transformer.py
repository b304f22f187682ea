"""The network of a model of DiffMoE, for inference, with torch and diffusers alone.

It lies beside the weights and computes what the project's own network does, expert by expert:
diffusers loads it with `trust_remote_code=True`. Training is not in here.

Shapes: B samples, T tokens of a sample, S = B * T, D width, E experts, L tokens of a caption.
"""

import math
from fractions import Fraction
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

# Of a batch of captions: tokens (B, L) as bytes or (B, L, D_text) as features, mask_BL where there
# is text (a row of False is the null caption), and pooled (B, D_pool) or None.
Text = tuple[Tensor, Tensor, Tensor | None]


class DiffMoETransformer(ModelMixin, ConfigMixin):
    """A diffusion transformer with a mixture of experts in every, or every second, block."""

    _keys_to_ignore_on_load_unexpected = [r"target_head"]  # noqa: RUF012 (as diffusers has it)
    positions: Tensor
    rotation: Tensor | None

    @register_to_config
    def __init__(
        self,
        model: dict[str, Any],
        moe: dict[str, Any],
        calibrated: dict[str, list[list[float]]] | None = None,
    ) -> None:
        """model, moe: sections of a configuration of DiffMoE. calibrated: thresholds of the MoE
        layers and their experts, as logits, by the name of their capacity.
        """
        super().__init__()
        width, patch, sides = model["width"], model["patch_size"], model["input_size"]
        height, columns = (sides, sides) if isinstance(sides, int) else sides
        self.grid = (height // patch, columns // patch)
        self.moe_blocks = [
            number
            for number in range(model["depth"])
            if moe["type"] != "dense" and (moe["every_block"] or number % 2)
        ]
        self.out_channels = model["in_channels"] * (2 if model["learn_sigma"] else 1)
        self.patch_embed = nn.Conv2d(model["in_channels"], width, patch, stride=patch)
        self.timestep_embed = TimestepEmbedder(width)
        if model["text"] is None:  # the last row is the null label
            self.label_embed = nn.Embedding(model["num_classes"] + 1, width)
        else:
            self.text_embed = TextEmbedder(model["text"], width)
        self.blocks = nn.ModuleList(
            Block(model, moe if number in self.moe_blocks else None)
            for number in range(model["depth"])
        )
        self.wide_head, last = None, width
        if model["wide_head"] is not None:
            self.wide_head, last = WideHead(model, self.grid), model["wide_head"]["width"]
        self.final_norm = plain_norm(last)
        self.final_adaln = nn.Linear(last, 2 * last)
        self.final = nn.Linear(last, patch**2 * self.out_channels)
        rotation = None
        if model["rope"]:
            head_width = model["head_width"] or width // model["heads"]
            rotation = rotary_angles(self.grid, head_width, model["rope_grid"] or self.grid)
        self.register_buffer("positions", grid_positions(width, self.grid), persistent=False)
        self.register_buffer("rotation", rotation, persistent=False)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        text: Text | None = None,
        capacity: float | None = None,
    ) -> Tensor:
        """The prediction (B, C or 2C, H, W), in fp32 at least, for noisy latents (B, C, H, W).

        timestep: (B,), 0 to 1 of a flow (1 is data), 0 to 999 of DDPM. class_labels: (B,), where
        num_classes is the null label; or text. capacity: a calibrated one; None: that of training.
        Raises ValueError for a capacity that is not calibrated.
        """
        x_BTD = patch_tokens(self.patch_embed, sample)
        x_BTD = x_BTD + self.positions.to(x_BTD.dtype)
        context = None
        if text is None:
            vector, null_B = self.label_embed(class_labels), class_labels == self.null_label
        else:
            context, vector, null_B = self.text_embed(*text)
        time_BD = self.timestep_embed(timestep)
        condition_BD = time_BD + vector
        thresholds = self.thresholds_of(capacity, sample.device)
        for number, block in enumerate(self.blocks):
            x_BTD = block(
                x_BTD,
                condition_BD,
                time_BD,
                null_B,
                self.rotation,
                context,
                thresholds.get(number),
            )
        last_condition = condition_BD
        if self.wide_head is not None:
            x_BTD, last_condition = self.wide_head(sample, x_BTD, time_BD, null_B)
        shift, scale = self.final_adaln(F.silu(last_condition)).chunk(2, dim=-1)
        return self._unpatchify(self.final(modulate(self.final_norm(x_BTD), shift, scale)))

    @property
    def null_label(self) -> int:
        """What stands for no class."""
        return self.config["model"]["num_classes"]

    def thresholds_of(
        self, capacity: float | None, device: torch.device | str = "cpu"
    ) -> dict[int, Tensor]:
        """Calibrated thresholds (E,) by the number of the block; empty where training's are used.

        Raises ValueError for a capacity that is not calibrated.
        """
        if capacity is None:
            return {}
        calibrated = self.config["calibrated"] or {}
        if f"{capacity:g}" not in calibrated:
            raise ValueError(
                f"capacity={capacity:g}: calibrated are {', '.join(calibrated) or 'none'}"
            )
        rows = torch.tensor(calibrated[f"{capacity:g}"], device=device)
        return dict(zip(self.moe_blocks, rows, strict=True))

    def _unpatchify(self, patches_BTP: Tensor) -> Tensor:
        (rows, columns), p = self.grid, self.config["model"]["patch_size"]
        B = patches_BTP.shape[0]
        image = patches_BTP.view(B, rows, columns, p, p, self.out_channels)
        image = image.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, rows * p, columns * p)
        return image.to(torch.promote_types(image.dtype, torch.float32))


class Block(nn.Module):
    """Attention, attention to a caption, feed-forward, modulated by the condition (adaLN-Zero)."""

    def __init__(self, model: dict[str, Any], moe: dict[str, Any] | None) -> None:
        """moe: None of a block with a dense MLP."""
        super().__init__()
        width = model["width"]
        self.norm1 = plain_norm(width)
        sizes = (width, model["heads"], model["head_width"], model["qk_norm"])
        self.attention = Attention(*sizes)
        self.cross_attention = None
        if model["text"] is not None:
            self.norm_cross = plain_norm(width)
            self.cross_attention = CrossAttention(*sizes)
        self.norm2 = plain_norm(width)
        self.has_experts = moe is not None
        if moe is None:
            hidden = int(width * model["mlp_ratio"])
            self.feed_forward: nn.Module = mlp(width, hidden, model["mlp_activation"])
        else:
            self.feed_forward = MoE(width, moe)
        self.adaln = nn.Linear(width, 6 * width)

    def forward(
        self,
        x_BTD: Tensor,
        condition: Tensor,
        time_BD: Tensor,
        null_B: Tensor,
        rotation: Tensor | None,
        context: tuple[Tensor, Tensor] | None,
        threshold_E: Tensor | None,
    ) -> Tensor:
        """condition: of samples (B, D) or of tokens (B, T, D). time_BD: of the timestep alone.
        null_B: samples without a condition. context: a caption's tokens (B, L, D) and mask_BL.
        threshold_E: calibrated, in the place of training's.
        """
        modulation = self.adaln(F.silu(condition)).chunk(6, dim=-1)
        shift, scale, gate = modulation[:3]
        h_BTD = self.attention(modulate(self.norm1(x_BTD), shift, scale), rotation)
        x_BTD = x_BTD + of_tokens(gate) * h_BTD
        if self.cross_attention is not None and context is not None:
            x_BTD = x_BTD + self.cross_attention(self.norm_cross(x_BTD), *context)
        shift, scale, gate = modulation[3:]
        plain_BTD = self.norm2(x_BTD)
        h_BTD = modulate(plain_BTD, shift, scale)
        if self.has_experts:
            h_BTD = self.feed_forward(h_BTD, plain_BTD, time_BD, null_B, threshold_E)
        else:
            h_BTD = self.feed_forward(h_BTD)
        return x_BTD + of_tokens(gate) * h_BTD


class WideHead(nn.Module):
    """Dense blocks over the noisy latents, embedded anew, modulated by each token of the others.

    RAE's DiT^DH (arXiv 2510.11690).
    """

    rotation: Tensor | None

    def __init__(self, model: dict[str, Any], grid: tuple[int, int]) -> None:
        super().__init__()
        head, patch = model["wide_head"], model["patch_size"]
        self.patch_embed = nn.Conv2d(model["in_channels"], head["width"], patch, stride=patch)
        self.project = nn.Linear(model["width"], head["width"])
        inside = model | head | {"head_width": None, "text": None}
        self.blocks = nn.ModuleList(Block(inside, None) for _ in range(head["depth"]))
        rotation = None
        if model["rope"]:
            head_width = head["width"] // head["heads"]
            rotation = rotary_angles(grid, head_width, model["rope_grid"] or grid)
        self.register_buffer("rotation", rotation, persistent=False)

    def forward(
        self, sample: Tensor, backbone_BTD: Tensor, time_BD: Tensor, null_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """-> tokens and the condition of each, for the last layer."""
        condition_BTD = self.project(F.silu(time_BD[:, None] + backbone_BTD))
        x_BTD = patch_tokens(self.patch_embed, sample)
        for block in self.blocks:
            x_BTD = block(x_BTD, condition_BTD, time_BD, null_B, self.rotation, None, None)
        return x_BTD, condition_BTD


class MoE(nn.Module):
    """Experts that each work on the tokens that a family of routing gives them (moe.type).

    Which tokens those are depends on each sample alone, never on the rest of its batch.
    """

    thresholds: Tensor
    selection_bias: Tensor

    def __init__(self, width: int, moe: dict[str, Any]) -> None:
        super().__init__()
        self.moe, E = moe, moe["experts"]
        hidden = int(width * moe["expert_ratio"])
        self.router = nn.Parameter(torch.empty(E, width))
        self.router_time = None
        if moe["router_input"] == "plain_with_time":
            self.router_time = nn.Parameter(torch.empty(E, width))
        self.experts = Experts(E, width, hidden, moe["activation"])
        self.shared_expert = None
        if moe["shared_expert_ratio"]:
            self.shared_expert = mlp(
                width, int(width * moe["shared_expert_ratio"]), moe["shared_expert_activation"]
            )
        if moe["type"] == "diffmoe":
            self.capacity_predictor = CapacityPredictor(width, E)
        elif moe["type"] == "race":
            self.router_hidden = nn.Linear(width, width)
            self.register_buffer("thresholds", torch.zeros(1))
        elif moe["type"] == "promoe":
            self.unconditional_expert = mlp(width, hidden, moe["activation"])
        elif moe["type"] == "dsmoe":
            self.register_buffer("selection_bias", torch.zeros(E))

    def forward(
        self,
        x_BTD: Tensor,
        plain_BTD: Tensor,
        time_BD: Tensor,
        null_B: Tensor,
        threshold_E: Tensor | None,
    ) -> Tensor:
        """What the experts add to each token. x_BTD: modulated tokens, plain_BTD: before that."""
        T = x_BTD.shape[1]
        tokens_SD = x_BTD.flatten(0, 1)
        null_S = null_B.repeat_interleave(T)
        scores_SE = self._scores(tokens_SD, plain_BTD, time_BD)
        factor = self.moe["experts"] if self.moe["gate_scale"] == "experts" else None
        gates_SE = scores_SE * float(factor or self.moe["gate_scale"])
        if self.moe["type"] in ("token_choice", "promoe", "dsmoe"):
            selected_SE = self._chosen_by_tokens(scores_SE)
        elif self.moe["type"] == "expert_choice":
            selected_SE = self._chosen_by_experts(scores_SE, T)
        else:
            selected_SE = self._above_threshold(tokens_SD, scores_SE, threshold_E)
        if self.moe["type"] == "dsmoe" and self.moe["top_k"] > 1:
            chosen_SE = gates_SE * selected_SE
            total_S1 = chosen_SE.sum(dim=1, keepdim=True) / float(factor or self.moe["gate_scale"])
            gates_SE = chosen_SE / (total_S1 + 1e-20)
        if self.moe["type"] == "promoe":
            selected_SE = selected_SE & ~null_S[:, None]
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        sum_SD = torch.zeros_like(tokens_SD, dtype=dtype)
        if self.shared_expert is not None:
            sum_SD = self.shared_expert(tokens_SD).to(dtype)
        if self.moe["type"] == "promoe":  # tokens without a condition have an expert of their own
            rows_nD = self.unconditional_expert(tokens_SD[null_S])
            sum_SD[null_S] += rows_nD.to(dtype)
        for expert, taken_S in enumerate(selected_SE.unbind(1)):
            rows_ND = self.experts(tokens_SD[taken_S], expert).to(dtype)
            sum_SD[taken_S] += rows_ND * gates_SE[taken_S, expert, None].to(dtype)
        return sum_SD.to(x_BTD.dtype).view_as(x_BTD)

    def _scores(self, tokens_SD: Tensor, plain_BTD: Tensor, time_BD: Tensor) -> Tensor:
        """What tokens are selected by and experts' outputs weighed by, (S, E), in fp32 at least."""
        modulated = self.moe["router_input"] == "modulated"
        seen_SD = tokens_SD if modulated else plain_BTD.flatten(0, 1)
        router_ED: Tensor = self.router
        if self.moe["type"] == "race":
            seen_SD = F.gelu(self.router_hidden(seen_SD), approximate="tanh")
        elif self.moe["type"] == "promoe":  # cosines to prototypes
            seen_SD = F.normalize(in_fp32(seen_SD), dim=-1)
            router_ED = F.normalize(in_fp32(router_ED), dim=-1)
        logits_SE = linear_in_fp32(seen_SD, router_ED)
        if self.router_time is not None:
            time_BE = linear_in_fp32(time_BD, self.router_time)
            logits_SE = logits_SE + time_BE.repeat_interleave(plain_BTD.shape[1], dim=0)
        if self.moe["gate"] == "softmax":
            return logits_SE.softmax(dim=-1)
        return logits_SE.sigmoid() if self.moe["gate"] == "sigmoid" else logits_SE

    def _above_threshold(
        self, tokens_SD: Tensor, scores_SE: Tensor, threshold_E: Tensor | None
    ) -> Tensor:
        """DiffMoE by predicted probabilities (arXiv 2503.14487, Eq. 14), Expert Race by scores."""
        if self.moe["type"] == "race":
            if threshold_E is None:
                return scores_SE >= self.thresholds
            return scores_SE > threshold_E
        logits_SE = self.capacity_predictor(tokens_SD)
        if threshold_E is None:
            return logits_SE.sigmoid() > self.capacity_predictor.thresholds
        return logits_SE > threshold_E

    def _chosen_by_tokens(self, scores_SE: Tensor) -> Tensor:
        """Each token takes its top_k experts; equal scores fall to the lower expert."""
        if self.moe["type"] == "dsmoe":
            scores_SE = scores_SE + self.selection_bias
        best_Sk = scores_SE.sort(dim=1, descending=True, stable=True).indices[
            :, : self.moe["top_k"]
        ]
        return torch.zeros_like(scores_SE, dtype=torch.bool).scatter(1, best_Sk, True)

    def _chosen_by_experts(self, scores_SE: Tensor, tokens_per_sample: int) -> Tensor:
        """Each expert takes K = T * C / E tokens of each sample (EC-DiT)."""
        moe, T = self.moe, tokens_per_sample
        capacity = Fraction(moe["capacity"]).limit_denominator(1_000_000)
        k = T * capacity.numerator // (moe["experts"] * capacity.denominator)
        if moe["capacity_rounding"] == "release":
            k = int(T / moe["experts"] * moe["capacity"])
        scores_BTE = scores_SE.unflatten(0, (-1, T))
        order_BTE = scores_BTE.sort(dim=1, descending=True, stable=True).indices
        best_BkE = order_BTE[:, : min(T, max(1, k))]
        selected_BTE = torch.zeros_like(scores_BTE, dtype=torch.bool).scatter(1, best_BkE, True)
        return selected_BTE.flatten(0, 1)


class CapacityPredictor(nn.Module):
    """Which tokens an expert would take out of a pool of training (Eq. 10, 11)."""

    thresholds: Tensor

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, experts)
        self.register_buffer("thresholds", torch.zeros(experts))

    def forward(self, tokens_SD: Tensor) -> Tensor:
        """Logits (S, E), in fp32 at least."""
        return linear_in_fp32(F.silu(self.hidden(tokens_SD)), self.out.weight, self.out.bias)


class Experts(nn.Module):
    """E MLPs of stacked weights, which are (E, in, out)."""

    def __init__(self, experts: int, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.swiglu = activation == "swiglu"
        if self.swiglu:
            self.w_gate = nn.Parameter(torch.empty(experts, width, hidden))
            self.w_up = nn.Parameter(torch.empty(experts, width, hidden))
        else:
            self.w_in = nn.Parameter(torch.empty(experts, width, hidden))
            self.b_in = nn.Parameter(torch.empty(experts, hidden))
            self.b_out = nn.Parameter(torch.empty(experts, width))
        self.w_out = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, rows_ND: Tensor, expert: int) -> Tensor:
        """One expert's output for its tokens, (N, D)."""
        if self.swiglu:
            hidden_NH = F.silu(rows_ND @ self.w_gate[expert]) * (rows_ND @ self.w_up[expert])
            return hidden_NH @ self.w_out[expert]
        hidden_NH = F.gelu(rows_ND @ self.w_in[expert] + self.b_in[expert], approximate="tanh")
        return hidden_NH @ self.w_out[expert] + self.b_out[expert]


class TextEmbedder(nn.Module):
    """Captions, as bytes or as an encoder's features, projected to the network's width."""

    def __init__(self, text: dict[str, Any], width: int) -> None:
        super().__init__()
        self.encoder, pooled = None, text["pooled"]
        if text["encoder"] == "bytes":
            self.encoder, pooled = ByteEncoder(text), text["width"]
        self.project = nn.Linear(text["width"], width)
        self.null_token = nn.Parameter(torch.empty(width))
        self.pooled_embed = nn.Linear(pooled, width) if pooled else None
        self.null_pooled = nn.Parameter(torch.empty(width)) if pooled else None

    def forward(
        self, tokens: Tensor, mask_BL: Tensor, pooled_BD: Tensor | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor | float, Tensor]:
        """-> (tokens (B, L, D), mask_BL) to attend to, what is added to the condition, null_B."""
        dtype, null_B = self.project.weight.dtype, ~mask_BL.any(dim=1)
        mask_BL = mask_BL | null_B[:, None]
        if self.encoder is None:
            features_BLD = tokens.to(dtype)
        else:
            features_BLD = self.encoder(tokens, mask_BL)
            weights_BL = mask_BL.to(dtype) / mask_BL.sum(dim=1, keepdim=True)
            pooled_BD = torch.einsum("bl,bld->bd", weights_BL, features_BLD)
        tokens_BLD = self.project(F.layer_norm(features_BLD, features_BLD.shape[-1:]))
        context = (torch.where(null_B[:, None, None], self.null_token, tokens_BLD), mask_BL)
        if self.pooled_embed is None or self.null_pooled is None or pooled_BD is None:
            return context, 0.0, null_B
        pooled_BD = F.layer_norm(pooled_BD.to(dtype), pooled_BD.shape[-1:])
        vector_BD = self.pooled_embed(pooled_BD)
        return context, torch.where(null_B[:, None], self.null_pooled, vector_BD), null_B


class ByteEncoder(nn.Module):
    """A transformer over a caption's UTF-8 bytes."""

    def __init__(self, text: dict[str, Any]) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, text["width"])
        self.places = nn.Parameter(torch.empty(text["length"], text["width"]))
        self.blocks = nn.ModuleList(EncoderBlock(text["width"]) for _ in range(text["depth"]))

    def forward(self, bytes_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Features (B, L, D_text)."""
        x_BLD = self.embed(bytes_BL) + self.places[: bytes_BL.shape[1]]
        for block in self.blocks:
            x_BLD = block(x_BLD, mask_BL)
        return x_BLD


class EncoderBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, max(1, width // 64), None, False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.feed_forward = MLP(width, 4 * width)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), None, mask_BL)
        return x_BLD + self.feed_forward(self.norm2(x_BLD))


class Attention(nn.Module):
    """Self-attention; optionally with normalized queries and keys, and rotary positions."""

    def __init__(self, width: int, heads: int, head_width: int | None, qk_norm: bool) -> None:
        """head_width: channels of one head; None: width / heads."""
        super().__init__()
        self.heads, self.head_width = heads, head_width or width // heads
        self.qkv = nn.Linear(width, 3 * heads * self.head_width)
        self.proj = nn.Linear(heads * self.head_width, width)
        self.q_norm = nn.RMSNorm(self.head_width) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_width) if qk_norm else nn.Identity()

    def forward(
        self, x_BTD: Tensor, rotation: Tensor | None, mask_BT: Tensor | None = None
    ) -> Tensor:
        """mask_BT: True for tokens to attend to; None: all."""
        qkv = self.qkv(x_BTD).unflatten(-1, (3, self.heads, self.head_width))
        query, key, value = (one.transpose(1, 2) for one in qkv.unbind(2))  # (B, heads, T, ...)
        query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        mask = None if mask_BT is None else mask_BT[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Queries of the image tokens over keys and values of a caption's tokens."""

    def __init__(self, width: int, heads: int, head_width: int | None, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width or width // heads
        self.q = nn.Linear(width, heads * self.head_width)
        self.kv = nn.Linear(width, 2 * heads * self.head_width)
        self.proj = nn.Linear(heads * self.head_width, width)
        self.q_norm = nn.RMSNorm(self.head_width) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_width) if qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        query = self.q(x_BTD).unflatten(-1, (self.heads, self.head_width)).transpose(1, 2)
        kv = self.kv(tokens_BLD).unflatten(-1, (2, self.heads, self.head_width))
        key, value = (one.transpose(1, 2) for one in kv.unbind(2))
        query, key = self.q_norm(query), self.k_norm(key)
        mixed = F.scaled_dot_product_attention(query, key, value, mask_BL[:, None, None])
        return self.proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def mlp(width: int, hidden: int, activation: str) -> nn.Module:
    """activation: gelu or swiglu."""
    return SwiGLU(width, hidden) if activation == "swiglu" else MLP(width, hidden)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep, unscaled, then an MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(256, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, t_B: Tensor) -> Tensor:
        steps = torch.arange(128, dtype=torch.float32, device=t_B.device)
        angles = t_B.float()[:, None] * torch.exp(-math.log(10000) * steps / 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(waves)))


def plain_norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


def patch_tokens(embed: nn.Conv2d, x: Tensor) -> Tensor:
    """Latents (B, C, H, W) as tokens (B, T, D)."""
    return embed(x.to(embed.weight.dtype)).flatten(2).transpose(1, 2).contiguous()


def of_tokens(vectors: Tensor) -> Tensor:
    """Vectors of samples (B, D) for all of their tokens, (B, 1, D); those of tokens as they are."""
    return vectors if vectors.dim() == 3 else vectors[:, None]


def modulate(x_BTD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x_BTD * (1 + of_tokens(scale)) + of_tokens(shift)


def in_fp32(tensor: Tensor) -> Tensor:
    """In fp32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def linear_in_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What decides the routing is computed in fp32 at least, inside of torch.autocast, too."""
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(in_fp32(x), in_fp32(weight), None if bias is None else in_fp32(bias))


def grid_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions (T, D): the first half for x, the second for y."""
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    y, x = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    parts = [
        wave(axis.reshape(-1, 1) * omega)
        for axis in (x.double(), y.double())
        for wave in (torch.sin, torch.cos)
    ]
    return torch.cat(parts, dim=1).float()


def rotary_angles(grid: tuple[int, int], head_width: int, made_for: tuple[int, int]) -> Tensor:
    """cos and sin of 2-D rotary positions, (2, T, h/2): half of the pairs rotate with y.

    made_for: rows and columns of the grid whose extent this one is spread over.
    """
    axes = (torch.arange(n) * extent / n for n, extent in zip(grid, made_for, strict=True))
    y, x = torch.meshgrid(*axes, indexing="ij")
    frequencies = 100.0 ** -torch.linspace(0, 1, head_width // 4, device=y.device)
    angles = torch.cat([y.reshape(-1, 1) * frequencies, x.reshape(-1, 1) * frequencies], dim=1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Each pair (x[i], x[i + h/2]) by its token's angle, in fp32."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.to(x.dtype)
