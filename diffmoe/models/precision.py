"""Which type products are computed in: torch.autocast on, seen from inside, and off."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

# By the names that options and records have for them.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """fp32 or bf16; of another type torch's name for it."""
    names = {value: name for name, value in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def autocast_to(dtype: torch.dtype | None, tensor: Tensor) -> AbstractContextManager:
    """Inside, products on the tensor's device are computed in `dtype`; None leaves them alone."""
    if dtype is None:
        return nullcontext()
    # Every weight is used once in a forward: a cache would only hold copies of all of them.
    return torch.autocast(tensor.device.type, dtype, cache_enabled=False)


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
