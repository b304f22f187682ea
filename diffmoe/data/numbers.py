"""How numbers are stored in npy files: float32, float16, bfloat16 as its bits in uint16, or the
bytes of pixels.
"""

import numpy as np
import torch


def stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """An fp32 array as the files hold it, rounded to nearest even.

    dtype: "float16", "bfloat16", "float32", or "uint8" of pixels -1..1. What float16 cannot hold
    becomes infinite.
    """
    if dtype == "uint8":
        return np.round((array + 1) * np.float32(127.5)).clip(0, 255).astype(np.uint8)
    if dtype == "bfloat16":
        return torch.from_numpy(array).to(torch.bfloat16).view(torch.uint16).numpy()
    with np.errstate(over="ignore"):
        return array.astype(dtype)


def restored(array: np.ndarray, dtype: str | None) -> np.ndarray:
    """The fp32 numbers of an array as the files hold it. dtype: the manifest's."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    numbers = array.astype(np.float32)
    if dtype == "uint8":
        numbers /= 127.5
        numbers -= 1
    return numbers


def numpy_types(dtype: str | None) -> tuple[np.dtype, ...]:
    """The types that an npy file may have under a manifest's dtype."""
    names = {None: ("float16", "float32"), "bfloat16": ("uint16",)}.get(dtype, (dtype,))
    return tuple(np.dtype(name) for name in names)
