"""Small real data folders: sample i is an array whose first number is i, its label i modulo 7."""

from pathlib import Path

import numpy as np
import pytest

from diffmoe.data.manifest import Manifest
from diffmoe.data.packing import ShardWriter

FIELDS = {
    "content": "sample",
    "scaled": True,
    "shape": (2, 4, 4),
    "flips": False,
    "classes": 7,
    "autoencoder": "identity",
    "source": "tests",
}


def array_of(index: int, shape: tuple[int, ...], sign: int = 1) -> np.ndarray:
    array = np.random.default_rng(index).standard_normal(shape).astype(np.float32)
    array[0, 0, 0] = sign * index
    return array


def pack(directory: Path, counts: list[int], **changes) -> Manifest:
    """Shards of these counts; the mirrored array of sample i, if wanted, begins with -i."""
    writer = ShardWriter(directory, counts, **{**FIELDS, **changes})
    with writer:
        for i in range(sum(counts)):
            shape = writer.manifest.array_shape
            flip = array_of(i, shape, sign=-1) if writer.manifest.flips else None
            writer.add(f"{i:05d}", i % 7, array_of(i, shape), flip)
    return writer.manifest


@pytest.fixture(name="pack", scope="session")
def pack_fixture():
    return pack


@pytest.fixture
def fields():
    return dict(FIELDS)
