"""Known images, and an extractor that needs no weights."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffmoe.evaluation.extractors import Features, load_extractor
from diffmoe.files import sha256_of
from diffmoe.seeding import keyed_generator

NAME = "tests.helpers.pictures:colors"


def colors(pixels: Tensor) -> Features:
    """(n, 6) means and standard deviations by channel; (n, 3) of a corner; (n, 3) shares."""
    pooled = torch.cat([pixels.mean((2, 3)), pixels.std((2, 3))], 1)
    return Features(pooled, pixels[:, :, 0, 0], pixels.mean((2, 3)).softmax(1))


def not_a_number(pixels: Tensor) -> Tensor:
    return colors(pixels).pooled / 0 * 0


def extractor(size: int | None = None):
    return load_extractor(NAME if size is None else f"{NAME}@{size}")


def pictures(number: int, seed: int = 0, channels: int = 3, size: int = 8) -> np.ndarray:
    """uint8 (number, size, size, channels): noise about a color of each one's own."""
    generator = keyed_generator("pictures", seed)
    color = torch.rand(number, 1, 1, channels, generator=generator) * 155 + 50
    noise = torch.randn(number, size, size, channels, generator=generator) * 20
    return (color + noise).round().clamp(0, 255).to(torch.uint8).numpy()


def write_samples(
    folder: Path, images: np.ndarray, shard: int = 7, classes: int = 5, **changes
) -> Path:
    """As diffmoe.sampling.many_images leaves them, of the classes in turn."""
    folder.mkdir(parents=True)
    shards = []
    for part, start in enumerate(range(0, len(images), shard)):
        file, some = folder / f"samples-{part:06d}.npz", images[start : start + shard]
        indices = np.arange(start, start + len(some))
        np.savez(file, images=some, labels=indices % classes, indices=indices)
        shards.append({"file": file.name, "samples": len(some), "sha256": sha256_of(file)})
    manifest = {"number": len(images), "steps": 3, "guidance": 1.5, "shards": shards}
    (folder / "samples.json").write_text(json.dumps(manifest | changes))
    return folder


def write_files(folder: Path, images: np.ndarray, classes: int = 1) -> Path:
    for index, image in enumerate(images):
        place = folder / f"class{index % classes}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(place / f"{index:03d}.png")
    return folder


def brightest_channel(pixels: Tensor) -> Tensor:
    """Scores of a classifier: (n, 3)."""
    return pixels.mean((2, 3))
