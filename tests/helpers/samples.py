"""Folders of samples of a small network."""

from pathlib import Path

import numpy as np

from diffmoe.data.autoencoders import PixelAutoencoder
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.sampling.many_images import SampleRequest, generate, shard_arrays
from tests.helpers.networks import network_of
from tests.helpers.tiny import tiny_config

RGB = tiny_config(model__in_channels=3)


ORDER = SampleRequest(11, (0, 1, 2, 3, 4))


SETTINGS = SamplingSettings(steps=3, guidance=1.5, seed=2)


def make(folder: Path, config=RGB, order=ORDER, settings=SETTINGS, topology=None, **changes):
    options = {"model": {"sha256": "a"}, "batch": 2, "shard_size": 4} | changes
    network = network_of(config, topology)
    decode = PixelAutoencoder().decode
    return generate(folder, network, config, decode, order, settings, **options)


def images_of(folder: Path) -> np.ndarray:
    return np.concatenate([images for images, _ in shard_arrays(folder, check=True)])
