"""Images without a picture: one color all over, or nearly all black or all white.

A reader that clips, a failed download or a blank page leave such images behind.
"""

import numpy as np

from diffmoe.data.manifest import Manifest
from diffmoe.data.numbers import restored

_SATURATED = 0.98  # of an image; the thinnest digit of MNIST is 94 % black
_TOO_MANY = 0.01  # of a data set


def flatness(image: np.ndarray, black: float, white: float) -> str | None:
    """What is wrong with an image (C,H,W) whose black and white are these numbers, if anything."""
    if (image.max((1, 2)) == image.min((1, 2))).all():
        return "one color"
    if max((image <= black).mean(), (image >= white).mean()) >= _SATURATED:
        return f"saturated ({_SATURATED:.0%} or more of it black, or white)"
    return None


class FlatImages:
    """Those of a data folder; of latents, the ones with a single number in each channel."""

    def __init__(self, manifest: Manifest):
        self._manifest = manifest
        self._are_pixels = manifest.autoencoder == "identity"
        self._number = 0
        self._found: dict[str, list[str]] = {}  # keys by what is wrong

    def add(self, key: str, array: np.ndarray) -> None:
        """array: of one sample, as the file holds it."""
        manifest = self._manifest
        image = restored(array, manifest.dtype)[: manifest.shape[0]]  # of moments the mean
        black, white = -np.inf, np.inf
        if self._are_pixels:
            if manifest.scaled:
                scale, shift = (
                    np.reshape(value, (-1, 1, 1)) for value in (manifest.scale, manifest.shift)
                )
                image = image / scale + shift
            black, white = -1 + 1 / 255, 1 - 1 / 255  # half a level of slack
        self._number += 1
        what = flatness(image, black, white)
        if what is not None:
            self._found.setdefault(what, []).append(key)

    def lines(self, problems: bool) -> list[str]:
        """What was found: of kinds with too many images (`problems`), or of the others."""
        return [
            f"{len(keys)} of {self._number} images ({len(keys) / self._number:.1%}) are {what}, "
            f"such as {', '.join(keys[:3])}"
            for what, keys in self._found.items()
            if (len(keys) > _TOO_MANY * self._number) == problems
        ]


def flat_on_sheet(images: np.ndarray) -> list[str]:
    """The same of decoded images (N,H,W,C) uint8: the problem, if there is one."""
    flat = [what for what in (flatness(x.transpose(2, 0, 1), 0, 255) for x in images) if what]
    if not flat:
        return []
    return [f"{len(flat)} of the {len(images)} images on the contact sheet are {flat[0]}"]
