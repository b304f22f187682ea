"""From the captions of a batch's samples to what the model is fed: one of each, padded."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from diffmoe.conditions import Text
from diffmoe.config import BYTES
from diffmoe.data.captions import Captions
from diffmoe.data.manifest import TextContent


class Caption(NamedTuple):
    """One caption's true tokens: (n, D) features, or (n,) bytes; and its pooled vector, if any."""

    tokens: np.ndarray
    pooled: np.ndarray | None = None


def byte_tokens(line: str, length: int) -> np.ndarray:
    """The first `length` bytes of a caption's UTF-8, uint8."""
    return np.frombuffer(line.encode()[:length], np.uint8)


def chosen(captions: Captions, draw: float, content: TextContent) -> Caption:
    """One of a sample's captions, by a number drawn from 0..1 (1 itself left out)."""
    k = int(draw * len(captions.lines))
    if content.encoder == BYTES:
        return Caption(byte_tokens(captions.lines[k], content.length))
    start, end = np.cumsum([0, *captions.lengths])[k : k + 2]
    pooled = None if captions.pooled is None else captions.pooled[k]
    return Caption(captions.tokens[start:end], pooled)


def padded(captions: Sequence[Caption], content: TextContent) -> Text:
    """The captions as one Text of content.length places, zeros behind each."""
    B, L = len(captions), content.length
    first = captions[0].tokens
    kind = np.int64 if content.encoder == BYTES else first.dtype
    tokens, mask_BL = np.zeros((B, L, *first.shape[1:]), kind), np.zeros((B, L), bool)
    for row, (some, _) in enumerate(captions):
        tokens[row, : len(some)] = some
        mask_BL[row, : len(some)] = True
    pooled = None
    if content.pooled:
        pooled = torch.from_numpy(np.stack([caption.pooled for caption in captions]))
    return Text(torch.from_numpy(tokens), torch.from_numpy(mask_BL), pooled)
