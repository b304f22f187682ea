"""A sample's captions as members of its shard: `txt`, and the features that an encoder made."""

from typing import NamedTuple

import numpy as np

from diffmoe.config import BYTES
from diffmoe.data.manifest import TextContent

# The npy members of the features, in the order of `Captions`.
FEATURES = ("text.npy", "text_lengths.npy", "text_pooled.npy")
CAPTION_BYTES = 256  # of captions that are read as bytes, where nothing else is said


class Captions(NamedTuple):
    """lines: one caption each, at least one. The features are there unless the encoder is `bytes`.

    tokens: (N, D) float16, the true tokens of all captions, one caption after another.
    lengths: (captions,) int32, how many of them each caption has. pooled: (captions, D_pool)
    float16, if the encoder gives it.
    """

    lines: list[str]
    tokens: np.ndarray | None = None
    lengths: np.ndarray | None = None
    pooled: np.ndarray | None = None


def caption_lines(txt: bytes) -> list[str]:
    """The captions in a `txt` member: its lines that are not blank. Raises ValueError for none."""
    lines = [line.strip() for line in txt.decode("utf-8").splitlines()]
    if not any(lines):
        raise ValueError("txt holds no caption")
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
    """Raises ValueError that says what does not fit the manifest's `text`."""
    if caption_lines(txt_member(captions.lines)) != captions.lines:
        raise ValueError(f"captions {captions.lines} are blank, or more than a line each")
    number, wanted = len(captions.lines), {}
    if content.encoder != BYTES:
        wanted = {"text.npy": ("float16", (sum(_lengths(captions, content)), content.width))}
        wanted["text_lengths.npy"] = ("int32", (number,))
    if content.pooled:
        wanted["text_pooled.npy"] = ("float16", (number, content.pooled))
    arrays = feature_arrays(captions)
    if arrays.keys() != wanted.keys():
        raise ValueError(
            f"there is {', '.join(arrays) or 'no feature'}, while text={content} of the manifest "
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
            raise ValueError(f"{name} holds NaN or infinity")


def _lengths(captions: Captions, content: TextContent) -> list[int]:
    if captions.lengths is None:
        return []
    if captions.lengths.ndim != 1 or captions.lengths.dtype.kind != "i":
        array = captions.lengths
        raise ValueError(f"text_lengths.npy is {array.dtype} {array.shape}; it is int32, one row")
    lengths = captions.lengths.tolist()
    if not all(0 < length <= content.length for length in lengths):
        raise ValueError(f"text_lengths.npy holds {lengths}; a caption has 1..{content.length}")
    return lengths
