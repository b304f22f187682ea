"""Captions: as members of a shard (`txt` and an encoder's features), and as a padded batch."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from diffmoe.conditions import Text
from diffmoe.config import BYTES
from diffmoe.data.manifest import TextContent

# The npy members of the features, in the order of `Captions`.
FEATURES = ("text.npy", "text_lengths.npy", "text_pooled.npy")


class Captions(NamedTuple):
    """All captions of a sample. With the encoder `bytes` there are no features.

    lines: the captions, at least one.
    tokens: (N, D) float16, the captions' features without padding, one caption after another.
    lengths: (captions,) int32, tokens of each caption.
    pooled: (captions, D_pool) float16, if the encoder has pooled vectors.
    """

    lines: list[str]
    tokens: np.ndarray | None = None
    lengths: np.ndarray | None = None
    pooled: np.ndarray | None = None


def caption_lines(txt: bytes) -> list[str]:
    """The captions in a `txt` member, its non-blank lines. Raises ValueError if there are none."""
    lines = [line.strip() for line in txt.decode("utf-8").splitlines()]
    if not any(lines):
        raise ValueError("txt contains no caption")
    return [line for line in lines if line]


def txt_member(lines: list[str]) -> bytes:
    """The `txt` member of captions."""
    return "\n".join(lines).encode()


def feature_arrays(captions: Captions) -> dict[str, np.ndarray]:
    """The npy members of the features, by name."""
    _, *arrays = captions
    pairs = zip(FEATURES, arrays, strict=True)
    return {name: array for name, array in pairs if array is not None}


def check_captions(captions: Captions, content: TextContent) -> None:
    """Raise ValueError for captions that do not fit the manifest's `text`."""
    if caption_lines(txt_member(captions.lines)) != captions.lines:
        raise ValueError(f"captions {captions.lines} must be non-blank, one line each")
    number = len(captions.lines)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {}
    if content.encoder != BYTES:
        wanted = {"text.npy": ("float16", (sum(_lengths(captions, content)), content.width))}
        wanted["text_lengths.npy"] = ("int32", (number,))
    if content.pooled:
        wanted["text_pooled.npy"] = ("float16", (number, content.pooled))
    arrays = feature_arrays(captions)
    if arrays.keys() != wanted.keys():
        raise ValueError(
            f"there is {', '.join(arrays) or 'no feature'}, but text={content} of the manifest "
            f"needs {', '.join(wanted) or 'none'}"
        )
    for name, (dtype, shape) in wanted.items():
        array = arrays[name]
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"{name} is {array.dtype} {array.shape}; {number} captions, their lengths and the "
                f"manifest's text need {dtype} {shape}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{name} contains NaN or infinity")


class Caption(NamedTuple):
    """One caption without padding: (n, D) features or (n,) bytes, and its pooled vector if any."""

    tokens: np.ndarray
    pooled: np.ndarray | None = None


def byte_tokens(line: str, length: int) -> np.ndarray:
    """The first `length` bytes of a caption's UTF-8, uint8."""
    return np.frombuffer(line.encode()[:length], np.uint8)


def choose_caption(captions: Captions, draw: float, content: TextContent) -> Caption:
    """One of a sample's captions. draw: a uniform random number from [0, 1)."""
    k = int(draw * len(captions.lines))
    if content.encoder == BYTES:
        return Caption(byte_tokens(captions.lines[k], content.length))
    assert captions.tokens is not None
    assert captions.lengths is not None
    start, end = np.cumsum([0, *captions.lengths])[k : k + 2]
    pooled = None if captions.pooled is None else captions.pooled[k]
    return Caption(captions.tokens[start:end], pooled)


def pad_captions(captions: Sequence[Caption], content: TextContent) -> Text:
    """The captions as one batch, each padded with zeros to content.length tokens."""
    B, L = len(captions), content.length
    first = captions[0].tokens
    kind = np.int64 if content.encoder == BYTES else first.dtype
    tokens, mask_BL = np.zeros((B, L, *first.shape[1:]), kind), np.zeros((B, L), bool)
    for row, caption in enumerate(captions):
        n = len(caption.tokens)
        tokens[row, :n] = caption.tokens
        mask_BL[row, :n] = True
    pooled = None
    if content.pooled:
        rows = [caption.pooled for caption in captions if caption.pooled is not None]
        pooled = torch.from_numpy(np.stack(rows))
    return Text(torch.from_numpy(tokens), torch.from_numpy(mask_BL), pooled)


def _lengths(captions: Captions, content: TextContent) -> list[int]:
    if captions.lengths is None:
        return []
    if captions.lengths.ndim != 1 or captions.lengths.dtype.kind != "i":
        array = captions.lengths
        raise ValueError(
            f"text_lengths.npy is {array.dtype} {array.shape}; it must be int32 with one dimension"
        )
    lengths = captions.lengths.tolist()
    if not all(0 < length <= content.length for length in lengths):
        raise ValueError(
            f"text_lengths.npy contains {lengths}; a caption has 1..{content.length} tokens"
        )
    return lengths
