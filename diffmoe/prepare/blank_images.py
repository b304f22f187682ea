"""Blank images: a single color, or almost entirely black or white.

They come from readers that clip, failed downloads and empty pages.
"""

import numpy as np

from diffmoe.data.latents import from_stored
from diffmoe.data.manifest import Manifest

_SATURATED = 0.98  # share of an image; the thinnest digit of MNIST is 94 % black
_TOO_MANY = 0.01  # share of a data set that makes it a problem


def blankness(image: np.ndarray, black: float, white: float) -> str | None:
    """Why an image (C,H,W) with these values of black and white counts as blank, or None."""
    if (image.max((1, 2)) == image.min((1, 2))).all():
        return "one color"
    if max((image <= black).mean(), (image >= white).mean()) >= _SATURATED:
        return f"saturated ({_SATURATED:.0%} or more of it black, or white)"
    return None


class BlankImages:
    """The blank images of a data folder; of latents, those with a single number per channel."""

    def __init__(self, manifest: Manifest):
        self._manifest = manifest
        self._are_pixels = manifest.autoencoder == "identity"
        self._number = 0
        self._found: dict[str, list[str]] = {}  # keys by what is wrong

    def add(self, key: str, array: np.ndarray) -> None:
        """Look at one sample. array: as the file holds it."""
        manifest = self._manifest
        image = from_stored(array, manifest.dtype)[: manifest.shape[0]]  # of moments, the mean
        black, white = -np.inf, np.inf
        if self._are_pixels:
            if manifest.scaled:
                scale, shift = (
                    np.reshape(value, (-1, 1, 1)) for value in (manifest.scale, manifest.shift)
                )
                image = image / scale + shift
            black, white = -1 + 1 / 255, 1 - 1 / 255  # half a level of slack
        self._number += 1
        what = blankness(image, black, white)
        if what is not None:
            self._found.setdefault(what, []).append(key)

    def lines(self, problems: bool) -> list[str]:
        """A line per kind of blank image; those with too many images are problems."""
        return [
            f"{len(keys)} of {self._number} images ({len(keys) / self._number:.1%}) are {what}, "
            f"such as {', '.join(keys[:3])}"
            for what, keys in self._found.items()
            if (len(keys) > _TOO_MANY * self._number) == problems
        ]


def blank_on_sheet(images: np.ndarray) -> list[str]:
    """The problem with decoded images uint8 (N,H,W,C), if there is one."""
    found = [blankness(image.transpose(2, 0, 1), 0, 255) for image in images]
    blank = [what for what in found if what]
    if not blank:
        return []
    return [f"{len(blank)} of the {len(images)} images on the contact sheet are {blank[0]}"]
