"""Checks of a network's inputs: with some wrong shapes broadcasting would compute silently."""

import torch
from torch import Tensor

from diffmoe.conditions import Condition, Text
from diffmoe.config import BYTES, ModelConfig, TextConfig

_LABEL_TYPES = (torch.int64, torch.int32)  # those of nn.Embedding


def check_inputs(model: ModelConfig, x: Tensor, t: Tensor, condition: Condition) -> None:
    """Raise ValueError naming the input that does not fit. Reads no values, so nothing waits."""
    latent = model.latent_shape
    if x.dim() != 4 or tuple(x.shape[1:]) != latent or not x.is_floating_point():
        raise ValueError(
            f"latents x: {_describe(x)}, but the network takes (B, {', '.join(map(str, latent))}) "
            "floats (model.in_channels, model.input_size)"
        )
    B = x.shape[0]
    if t.dim() != 1 or t.shape[0] != B or t.dtype == torch.bool or t.is_complex():
        raise ValueError(f"times t: {_describe(t)}, but {B} latents take one number each, ({B},)")
    if model.text is not None:
        _check_text(model.text, B, condition)
    elif isinstance(condition, Text):
        raise ValueError("captions given to a class-conditioned network; give it labels (B,)")
    elif condition.dim() != 1 or condition.shape[0] != B or condition.dtype not in _LABEL_TYPES:
        raise ValueError(
            f"labels: {_describe(condition)}, but {B} latents take one class number each, ({B},) "
            "of int64 or int32"
        )


def _check_text(text: TextConfig, B: int, condition: Condition) -> None:
    if not isinstance(condition, Text):
        raise ValueError(
            f"labels given to a text-conditioned network; give it {Text.__module__}.Text"
        )
    tokens, mask_BL, pooled = condition
    if mask_BL.dim() != 2 or mask_BL.shape[0] != B or mask_BL.dtype != torch.bool:
        raise ValueError(f"captions' mask_BL: {_describe(mask_BL)}, not ({B}, L) of bool")
    L = mask_BL.shape[1]
    if text.encoder == BYTES:
        fits = tokens.dim() == 2 and tokens.dtype in _LABEL_TYPES and text.length >= L
        wanted = f"byte ids ({B}, L), L up to model.text.length={text.length}"
    else:
        fits = tokens.dim() == 3 and tokens.shape[2] == text.width and tokens.is_floating_point()
        wanted = f"features ({B}, L, {text.width}) (model.text.width)"
    if not fits or tokens.shape[0] != B or tokens.shape[1] != L:
        raise ValueError(
            f"captions' tokens: {_describe(tokens)} with a mask of L={L}, not {wanted}"
        )
    if text.pooled == 0:
        if pooled is not None:
            raise ValueError("captions' pooled: given, but model.text.pooled=0 takes none")
    elif pooled is None or pooled.dim() != 2 or tuple(pooled.shape) != (B, text.pooled):
        found = "missing" if pooled is None else _describe(pooled)
        raise ValueError(f"captions' pooled: {found}, not ({B}, {text.pooled}) (model.text.pooled)")


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
