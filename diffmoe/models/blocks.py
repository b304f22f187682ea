"""The parts of a DiT: attention, dense MLP, embedders, and the adaLN-Zero block around them."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffmoe.models.initialization import normal, starting, zero_linear


def maybe_checkpoint(active: bool, function: Callable[..., Any], *args: Any) -> Any:
    """Call `function`; if active, keep only its inputs and compute it again in the backward."""
    if not active:
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Three matrices, no biases, as the experts of that activation have."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def dense_mlp(width: int, hidden: int, activation: str) -> MLP | SwiGLU:
    """activation: gelu or swiglu."""
    return (SwiGLU if activation == "swiglu" else MLP)(width, hidden)


class Attention(nn.Module):
    """Multi-head self-attention, optionally with normalized queries and keys, rotary positions.

    head_width: channels of one head; None: width / heads.
    """

    def __init__(
        self, width: int, heads: int, qk_norm: bool, head_width: int | None = None
    ) -> None:
        super().__init__()
        head_width = head_width or width // heads
        self.heads, self.head_width = heads, head_width
        self.qkv = nn.Linear(width, 3 * heads * head_width)
        self.proj = nn.Linear(heads * head_width, width)
        self.q_norm = nn.RMSNorm(head_width) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_width) if qk_norm else nn.Identity()

    def forward(
        self, x_BTD: Tensor, rotation: Tensor | None, mask_BT: Tensor | None = None
    ) -> Tensor:
        """mask_BT: True for tokens to attend to, at least one in each row; None: all."""
        B, T, _ = x_BTD.shape
        qkv = self.qkv(x_BTD).view(B, T, 3, self.heads, self.head_width)
        query, key, value = (one.transpose(1, 2) for one in qkv.unbind(2))  # (B, heads, T, ...)
        query, key = self.q_norm(query), self.k_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        mask = None if mask_BT is None else mask_BT[:, None, None]
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class Context(NamedTuple):
    """Tokens that image tokens attend to beside themselves: tokens_BLD, where mask_BL is True."""

    tokens_BLD: Tensor
    mask_BL: Tensor


class CrossAttention(nn.Module):
    """Queries of the image tokens over keys and values of the context. The output starts at 0."""

    def __init__(self, width: int, heads: int, qk_norm: bool, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.q = nn.Linear(width, heads * head_width)
        self.kv = nn.Linear(width, 2 * heads * head_width)
        self.proj = zero_linear(heads * head_width, width)
        self.q_norm = nn.RMSNorm(head_width) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_width) if qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        (B, T, _), L = x_BTD.shape, tokens_BLD.shape[1]
        query = self.q(x_BTD).view(B, T, self.heads, self.head_width).transpose(1, 2)
        kv = self.kv(tokens_BLD).view(B, L, 2, self.heads, self.head_width)
        key, value = (one.transpose(1, 2) for one in kv.unbind(2))  # (B, heads, L, ...)
        query, key = self.q_norm(query), self.k_norm(key)
        mixed = F.scaled_dot_product_attention(query, key, value, mask_BL[:, None, None])
        return self.proj(mixed.transpose(1, 2).flatten(2))


def rotary_angles(
    grid: tuple[int, int], head_width: int, made_for: tuple[int, int] | None = None
) -> Tensor:
    """cos and sin of 2-D rotary positions, (2, T, h/2): half of the pairs rotate with y.

    grid: rows and columns of tokens. made_for: of the grid whose extent they are spread over
    (position interpolation, arXiv 2306.15595, on each axis); None: this one.
    """
    made_for = made_for or grid
    axes = (torch.arange(n) * extent / n for n, extent in zip(grid, made_for, strict=True))
    y, x = torch.meshgrid(*axes, indexing="ij")
    # Once transformers has loaded a model, linspace ignores `with torch.device(...)`.
    frequencies = 100.0 ** -torch.linspace(0, 1, head_width // 4, device=y.device)
    angles = torch.cat([y.reshape(-1, 1) * frequencies, x.reshape(-1, 1) * frequencies], dim=1)
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + h/2]) by its token's angle, in fp32."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.to(x.dtype)


class TimestepEmbedder(nn.Module):
    """Sinusoids of the timestep, unscaled, then an MLP (as in DiT and ADM)."""

    frequencies = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = starting(nn.Linear(self.frequencies, width), weight=normal(0.02))
        self.fc2 = starting(nn.Linear(width, width), weight=normal(0.02))

    def forward(self, t_B: Tensor) -> Tensor:
        half = self.frequencies // 2
        steps = torch.arange(half, dtype=torch.float32, device=t_B.device)
        angles = t_B.float()[:, None] * torch.exp(-math.log(10000) * steps / half)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.fc1.weight.dtype)
        return self.fc2(F.silu(self.fc1(waves)))


def grid_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine positions (MAE, DiT): first half of the width for x, second for y.

    grid: rows and columns of tokens. (T, width) in fp32.
    """
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    y, x = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    parts = [
        wave(axis.reshape(-1, 1) * omega)
        for axis in (x.double(), y.double())
        for wave in (torch.sin, torch.cos)
    ]
    return torch.cat(parts, dim=1).float()


def patch_tokens(embed: nn.Conv2d, x: Tensor) -> Tensor:
    """Latents (B, C, H, W) as tokens (B, T, D)."""
    x_BDT = embed(x.to(embed.weight.dtype)).flatten(2)
    # A sum has its first term's memory layout: without a copy, that of the patches in all blocks.
    return x_BDT.transpose(1, 2).contiguous()


def of_tokens(vectors: Tensor) -> Tensor:
    """Vectors of samples (B, D) for all of their tokens, (B, 1, D); those of tokens as they are."""
    return vectors if vectors.dim() == 3 else vectors[:, None]


def modulate(x_BTD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """shift, scale: of samples (B, D) or of tokens (B, T, D)."""
    return x_BTD * (1 + of_tokens(scale)) + of_tokens(shift)


class Block(nn.Module):
    """Attention and feed-forward, each modulated and gated by the condition (adaLN-Zero).

    cross_attention: to a context, between the two. Its output starts at zero, so it has no gate:
    behind a gate of zero neither would ever learn.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        qk_norm: bool,
        feed_forward: nn.Module,
        cross_attention: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, heads, qk_norm, head_width)
        self.norm_cross: nn.LayerNorm | None = None
        self.cross_attention: CrossAttention | None = None
        if cross_attention:
            self.norm_cross = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
            self.cross_attention = CrossAttention(width, heads, qk_norm, head_width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.feed_forward = feed_forward
        self.adaln = zero_linear(width, 6 * width)
        self.checkpointing = False

    def forward(
        self,
        x_BTD: Tensor,
        condition: Tensor,
        time_BD: Tensor,
        null_B: Tensor,
        rotation: Tensor | None,
        context: Context | None = None,
    ) -> tuple[Tensor, Any]:
        """The new tokens, and the LayerRouting of an MoE feed-forward (None of a dense one).

        condition: of samples (B, D) or of tokens (B, T, D). time_BD: embedding of the timestep
        alone, which the condition contains, too. null_B: which samples have no condition.
        """
        modulation = self.adaln(F.silu(condition)).chunk(6, dim=-1)
        x_BTD = maybe_checkpoint(self.checkpointing, self._attend, x_BTD, *modulation[:3], rotation)
        if context is not None:
            x_BTD = maybe_checkpoint(self.checkpointing, self._attend_to_context, x_BTD, *context)
        shift, scale, gate = modulation[3:]
        plain_BTD = self.norm2(x_BTD)
        h_BTD = modulate(plain_BTD, shift, scale)
        if isinstance(self.feed_forward, MLP | SwiGLU):
            h_BTD, routing = maybe_checkpoint(self.checkpointing, self.feed_forward, h_BTD), None
        else:
            h_BTD, routing = self.feed_forward(h_BTD, plain_BTD, time_BD, null_B)
        return x_BTD + of_tokens(gate) * h_BTD, routing

    def _attend(
        self, x_BTD: Tensor, shift: Tensor, scale: Tensor, gate: Tensor, rotation: Tensor | None
    ) -> Tensor:
        h_BTD = modulate(self.norm1(x_BTD), shift, scale)
        return x_BTD + of_tokens(gate) * self.attention(h_BTD, rotation)

    def _attend_to_context(self, x_BTD: Tensor, tokens_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        assert self.cross_attention is not None
        assert self.norm_cross is not None
        return x_BTD + self.cross_attention(self.norm_cross(x_BTD), tokens_BLD, mask_BL)
