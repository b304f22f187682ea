"""What a sample is conditioned on: a class label, or the text of a caption."""

from typing import NamedTuple

import torch
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


# Class labels (B,), of which num_classes is the null one; or captions.
Condition = Tensor | Text


def unconditional(condition: Condition, where_B: Tensor, num_classes: int) -> Condition:
    """The condition with the null label, or the null caption, where the mask is True."""
    if isinstance(condition, Text):
        return condition._replace(mask_BL=condition.mask_BL & ~where_B[:, None])
    return torch.where(where_B, num_classes, condition)
