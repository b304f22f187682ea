"""What a sample is conditioned on: a class label, or the text of a caption."""

from typing import NamedTuple

import torch
from torch import Tensor


class Text(NamedTuple):
    """Captions of B samples, padded to L positions.

    tokens: (B, L, D_text) features of a frozen encoder, or (B, L) byte ids (int64) for a model that
    trains its own encoder. mask_BL: True where there is text; a row of False is the null caption.
    pooled: (B, D_pool), one vector per caption, or None.
    """

    tokens: Tensor
    mask_BL: Tensor
    pooled: Tensor | None = None

    @property
    def null_B(self) -> Tensor:
        """Which captions are the null caption."""
        return ~self.mask_BL.any(dim=1)


# Class labels (B,), where num_classes is the null label; or captions.
Condition = Tensor | Text


def is_unconditional(condition: Condition, num_classes: int) -> Tensor:
    """Which samples have the null label or caption, (B,)."""
    if isinstance(condition, Text):
        return condition.null_B
    return condition == num_classes


def unconditional(condition: Condition, where_B: Tensor, num_classes: int) -> Condition:
    """The condition with the null label or caption where `where_B` is True."""
    if isinstance(condition, Text):
        return condition._replace(mask_BL=condition.mask_BL & ~where_B[:, None])
    return torch.where(where_B, num_classes, condition)
