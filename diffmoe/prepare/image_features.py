"""Add a frozen image encoder's features to shards, for representation alignment."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from diffmoe.data.autoencoders import autoencoder_of
from diffmoe.data.latents import Sample, model_latents
from diffmoe.data.manifest import FeatureContent, Manifest
from diffmoe.errors import UserError
from diffmoe.prepare.resharding import rewrite
from diffmoe.prepare.sharding import ShardOutput


class ImageEncoder(Protocol):
    """name, layer, checksum: as in `FeatureContent`, whose encoder is the name."""

    @property
    def name(self) -> str: ...

    @property
    def layer(self) -> str: ...

    @property
    def checksum(self) -> str | None: ...

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 images (n, H, W, 3) to features (n, Z, h, w)."""


def encode_features(
    directory: str | Path,
    output: ShardOutput,
    encoder: ImageEncoder,
    *,
    batch: int = 64,
    device: str | torch.device = "cpu",
) -> Manifest | None:
    """Rewrite shards with the features of each image in float16, and of its mirror image if data
    has flips. Images are what the data's autoencoder decodes, of moments their mean.

    Returns the new manifest, or None while other ranks are still working. batch: images per pass.
    device: for decoding. Raises UserError.
    """
    if batch < 1:
        raise UserError(f"--batch {batch} must be at least 1")
    # A resumed command must give the same bytes for the same images.
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    manifest = Manifest.load(directory)
    autoencoder = autoencoder_of(manifest.latent_spec, device)
    means = manifest.model_copy(update={"content": "sample"})

    def features(arrays: Sequence[np.ndarray]) -> Tensor:
        own = [array[: manifest.shape[0]] for array in arrays]
        latents = model_latents(own, means, torch.Generator())  # which nothing is drawn from
        return encoder(_in_color(autoencoder.decode(latents)))

    blank = np.zeros(manifest.array_shape, np.uint8 if manifest.dtype == "uint8" else np.float32)
    if manifest.dtype == "bfloat16":
        blank = blank.astype(np.uint16)
    content = FeatureContent(
        encoder=encoder.name,
        layer=encoder.layer,
        checksum=encoder.checksum,
        shape=tuple(features([blank]).shape[1:]),
    )

    def with_features(samples: Iterator[Sample]) -> Iterator[Sample]:
        while some := list(islice(samples, batch)):
            views = [[sample.array for sample in some]]
            if manifest.flips:
                views.append([_mirrored(sample) for sample in some])
            encoded = [features(arrays).half().cpu().numpy() for arrays in views]
            for sample, *own in zip(some, *encoded, strict=True):
                yield sample._replace(features=tuple(own))

    changes = {"features": content.model_dump()}
    return rewrite(directory, output, with_features, changes=changes, settings={"batch": batch})


def _mirrored(sample: Sample) -> np.ndarray:
    """Stored, or of pixels the same turned."""
    return sample.array[..., ::-1] if sample.flip is None else sample.flip


def _in_color(images: Tensor) -> Tensor:
    """Images (n, H, W, 1 or 3) as (n, H, W, 3)."""
    channels = images.shape[-1]
    if channels not in (1, 3):
        raise UserError(
            f"the data's images have {channels} channels; an image encoder takes 1 or 3"
        )
    return images.expand(-1, -1, -1, 3)
