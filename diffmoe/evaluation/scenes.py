"""Checks whether images of colored digits show what was requested, by simple classifiers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffmoe.digits.captioned_digits import COLORS, SIZE, Digits, Scene, all_scenes, halves
from diffmoe.digits.digit_network import fit_digits
from diffmoe.errors import UserError
from diffmoe.evaluation.image_sets import ImageSet, batches
from diffmoe.files import read_text

_REAL = 10  # held-out images of each scene


class SceneReader:
    """Recognizes the color and the digit at the two places of a relation."""

    def __init__(self) -> None:
        real = Digits()
        self._digits = fit_digits(real.shapes, real.labels)
        rng, scenes = np.random.default_rng(0), all_scenes()[::12]
        self._colors = _mean_colors([(scene, real.draw(scene, rng)) for scene in scenes])

    def __call__(self, canvases: np.ndarray, relations: Sequence[str]) -> list[Scene]:
        """The scenes of uint8 canvases (n,32,32,3). relations: where to look in each."""
        places = np.concatenate(  # (2n,16,16,3)
            [
                place
                for pair in zip(canvases[:, None], relations, strict=True)
                for place in halves(*pair)
            ]
        )
        distances = np.linalg.norm(_hues(places)[:, None] - self._colors, axis=-1)
        colors = np.array(list(COLORS))[distances.argmin(1)].reshape(-1, 2).tolist()
        digits = self._digits(places.max(-1)).reshape(-1, 2).tolist()
        return [
            Scene(relation, tuple(names), tuple(numbers))
            for relation, names, numbers in zip(relations, colors, digits, strict=True)
        ]


def load_truth(file: str | Path) -> dict[str, Scene]:
    """The scene of each caption of an unseen.json. Raises UserError for another file."""
    try:
        entries = json.loads(read_text(file, encoding="utf-8-sig"))
        truth = {
            entry["prompt"]: Scene(
                entry["relation"],
                tuple(entry["colors" if "colors" in entry else "colours"]),  # in older files
                tuple(entry["digits"]),
            )
            for entry in entries
        }
        if unknown := sorted(map(str, set(truth.values()) - set(all_scenes()))):
            raise ValueError(f"there is no {unknown[0]}")
        return truth
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"--truth {file} cannot be read ({type(error).__name__}: {error}); give the "
            "unseen.json of captioned-digits"
        ) from None


def scene_accuracy(
    images: ImageSet, truth: dict[str, Scene], read: SceneReader, batch: int = 50
) -> dict[str, float]:
    """The shares of digits, of colors, and of complete scenes that agree with the captions.

    Raises UserError unless the images are samples whose captions are all in `truth`.
    """
    captions = images.captions()
    unknown = sorted(set(captions) - truth.keys())
    if unknown:
        raise UserError(f"{images.path}: the truth has no {unknown[0]!r}")
    wanted, shown = [], []
    for part in batches(images, batch):
        if part.images.shape[1:] != (SIZE, SIZE, 3):
            raise UserError(f"{images.path}: {part.images.shape[1:]} is not a canvas of the scenes")
        scenes = [truth[captions[label]] for label in part.known_labels]
        wanted += scenes
        shown += read(part.images, [scene.relation for scene in scenes])
    return _shares(shown, wanted)


def real_accuracy(truth: dict[str, Scene], read: SceneReader) -> dict[str, float]:
    """As `scene_accuracy`, of real canvases with digits that the reader was not fitted to."""
    digits, rng = Digits(held_out=True), np.random.default_rng(0)
    wanted = [scene for scene in truth.values() for _ in range(_REAL)]
    canvases = np.stack([digits.draw(scene, rng) for scene in wanted])
    return _shares(read(canvases, [scene.relation for scene in wanted]), wanted)


def _shares(shown: Sequence[Scene], wanted: Sequence[Scene]) -> dict[str, float]:
    def share(found: Any, requested: Any) -> float:
        return float((np.array(found) == np.array(requested)).mean())

    return {
        "digits": share([s.digits for s in shown], [s.digits for s in wanted]),
        "colors": share([s.colors for s in shown], [s.colors for s in wanted]),
        "scenes": float(np.mean([s == w for s, w in zip(shown, wanted, strict=True)])),
    }


def _hues(places: np.ndarray) -> np.ndarray:
    """The mean color (n,3) of each place, normalized, so that a digit's thickness has no effect."""
    means = places.astype(np.float64).mean((1, 2))
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-9)


def _mean_colors(drawn: list[tuple[Scene, np.ndarray]]) -> np.ndarray:
    """The mean hue of each color (6,3), over all places that have it."""
    of: dict[str, list[np.ndarray]] = {name: [] for name in COLORS}
    for scene, canvas in drawn:
        hues = _hues(np.concatenate(halves(canvas[None], scene.relation)))
        for name, hue in zip(scene.colors, hues, strict=True):
            of[name].append(hue)
    return np.stack([np.mean(hues, axis=0) for hues in of.values()])
