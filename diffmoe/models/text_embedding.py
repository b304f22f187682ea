"""Captions projected to the network's width, with a learned null caption."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffmoe.conditions import Text
from diffmoe.config import BYTES, TextConfig
from diffmoe.models.blocks import Context
from diffmoe.models.byte_encoder import ByteEncoder
from diffmoe.models.initialization import normal, zero_linear, zeros


class TextEmbedder(nn.Module):
    """Captions projected to the network's width. The null caption is learned.

    It is a token and, where captions have a pooled vector, a vector. (With an encoder's features of
    the empty string instead, sampling without a caption would need that encoder.) Because of the
    token, attention always has something to attend to.
    """

    def __init__(self, text: TextConfig, width: int) -> None:
        super().__init__()
        self.encoder: ByteEncoder | None = None
        pooled = text.pooled
        if text.encoder == BYTES:
            self.encoder, pooled = ByteEncoder(text), text.width
        self.project = nn.Linear(text.width, width)
        self.null_token = nn.Parameter(torch.empty(width))
        # Zero, as is the output of cross-attention: a text model starts as one without text.
        self.pooled_embed = zero_linear(pooled, width) if pooled else None
        self.null_pooled = nn.Parameter(torch.empty(width)) if pooled else None
        self.initializers = {"null_token": normal(0.02), "null_pooled": zeros}

    def forward(self, text: Text) -> tuple[Context, Tensor | float]:
        """-> what the blocks attend to, and what captions add to the condition (B, D)."""
        dtype = self.project.weight.dtype
        null_B1 = text.null_B[:, None]
        mask_BL = text.mask_BL | null_B1
        if self.encoder is None:
            features_BLD = text.tokens.to(dtype)
            pooled_BD = None if text.pooled is None else text.pooled.to(dtype)
        else:
            features_BLD = self.encoder(text.tokens, mask_BL)
            weights_BL = mask_BL.to(dtype) / mask_BL.sum(dim=1, keepdim=True)
            pooled_BD = torch.einsum("bl,bld->bd", weights_BL, features_BLD)
        # Encoders differ in scale by orders of magnitude.
        tokens_BLD = self.project(F.layer_norm(features_BLD, features_BLD.shape[-1:]))
        # Attention to a row of equal tokens gives what attention to one of them does.
        tokens_BLD = torch.where(null_B1[..., None], self.null_token, tokens_BLD)
        context = Context(tokens_BLD, mask_BL)
        if self.pooled_embed is None:
            return context, 0.0
        assert pooled_BD is not None
        assert self.null_pooled is not None
        vector_BD = self.pooled_embed(F.layer_norm(pooled_BD, pooled_BD.shape[-1:]))
        return context, torch.where(null_B1, self.null_pooled, vector_BD)
