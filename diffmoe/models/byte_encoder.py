"""A small transformer over a caption's bytes, trained together with the model."""

import torch
from torch import Tensor, nn

from diffmoe.config import TextConfig
from diffmoe.models.blocks import MLP, Attention
from diffmoe.models.initialization import normal, starting

HEAD_WIDTH = 64


class ByteEncoder(nn.Module):
    """Embeddings of bytes and their positions, then pre-norm transformer blocks over the caption.

    Needs no vocabulary and no pretrained weights, and takes any language that UTF-8 encodes.
    """

    def __init__(self, text: TextConfig) -> None:
        super().__init__()
        # At the scale of what the blocks add: beside it, smaller ones would vanish, and with the
        # positions the order of words.
        self.embed = starting(nn.Embedding(256, text.width), weight=normal(1.0))
        self.places = nn.Parameter(torch.empty(text.length, text.width))
        self.initializers = {"places": normal(1.0)}
        self.blocks = nn.ModuleList(EncoderBlock(text.width) for _ in range(text.depth))

    def forward(self, bytes_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Features (B, L, D_text). mask_BL: where there is text, at least once in each row."""
        x_BLD = self.embed(bytes_BL) + self.places[: bytes_BL.shape[1]]
        for block in self.blocks:
            x_BLD = block(x_BLD, mask_BL)
        return x_BLD


class EncoderBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.attention = Attention(width, max(1, width // HEAD_WIDTH), qk_norm=False)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False)
        self.feed_forward = MLP(width, 4 * width)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        x_BLD = x_BLD + self.attention(self.norm1(x_BLD), None, mask_BL)
        return x_BLD + self.feed_forward(self.norm2(x_BLD))
