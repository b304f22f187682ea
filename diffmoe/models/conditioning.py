"""What a sample is conditioned on: a class label, or the text of a caption."""

from typing import NamedTuple

from torch import Tensor


class Text(NamedTuple):
    """Captions of B samples, padded to L positions.

    tokens: (B, L, D_text) features of a frozen encoder, or (B, L) byte ids (int64) of a model that
    trains its own. mask_BL: True where a position is text; a row without any is the null caption.
    pooled: (B, D_pool) one vector a caption, or None.
    """

    tokens: Tensor
    mask_BL: Tensor
    pooled: Tensor | None = None
