"""Captions in the width of the network, with a learned null caption."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffmoe.conditions import Text
from diffmoe.config import BYTES, TextConfig
from diffmoe.models.blocks import Context
from diffmoe.models.byte_encoder import ByteEncoder


class TextEmbedder(nn.Module):
    """Captions in the width of the network, and in the place of the null caption learned ones.

    Learned: a token and, where captions have a pooled vector, a vector. An encoder's features of
    the empty string would do, but then training and sampling without a caption need that encoder.
    With a token, no row of the attention is ever empty.
    """

    def __init__(self, text: TextConfig, width: int) -> None:
        super().__init__()
        self.encoder, pooled = None, text.pooled
        if text.encoder == BYTES:
            self.encoder, pooled = ByteEncoder(text), text.width
        self.project = nn.Linear(text.width, width)
        self.null_token = nn.Parameter(torch.empty(width))
        self.pooled_embed = nn.Linear(pooled, width) if pooled else None
        self.null_pooled = nn.Parameter(torch.empty(width)) if pooled else None

    def forward(self, text: Text) -> tuple[Context, Tensor | float]:
        """-> what the blocks look at, and what captions add to the condition (B, D)."""
        dtype = self.project.weight.dtype
        null_B1 = ~text.mask_BL.any(dim=1, keepdim=True)
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
        # The same token at every place of the row is, to attention, one token.
        tokens_BLD = torch.where(null_B1[..., None], self.null_token, tokens_BLD)
        context = Context(tokens_BLD, mask_BL)
        if self.pooled_embed is None:
            return context, 0.0
        vector_BD = self.pooled_embed(F.layer_norm(pooled_BD, pooled_BD.shape[-1:]))
        return context, torch.where(null_B1, self.null_pooled, vector_BD)
