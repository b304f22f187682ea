"""Which type a surrounding torch.autocast computes in, and how to turn it off."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The type that torch.autocast computes products of `tensor` in here; None outside of it."""
    kind = tensor.device.type
    # Devices such as meta know no autocast; asking whether it is on there is an error.
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return None if tensor.dtype == torch.float64 else torch.get_autocast_dtype(kind)


def outside_autocast(tensor: Tensor) -> AbstractContextManager:
    """Inside, products of `tensor` are computed in its own type."""
    if autocast_dtype(tensor) is None:
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
