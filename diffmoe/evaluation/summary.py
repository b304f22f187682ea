"""Summarizes images: everything that the metrics need, computed in one pass."""

import hashlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from diffmoe.errors import UserError
from diffmoe.evaluation.extractors import Extractor
from diffmoe.evaluation.image_sets import ImageSet, batches, require_rgb
from diffmoe.evaluation.inception_score import InceptionScore
from diffmoe.evaluation.moments import Gaussian, Moments


class Summary(NamedTuple):
    """Statistics of images. Only `features` grows with their number.

    features: (k, d) float32 on the CPU, of all images or of evenly spaced ones. spatial and
    inception_score (mean, spread over splits): None if the extractor does not give them.
    duplicates: images that equal an earlier one. seconds: of the pass, `extracting` of them in the
    network.
    """

    number: int
    shape: tuple[int, int, int]
    pooled: Gaussian
    spatial: Gaussian | None
    features: Tensor
    inception_score: tuple[float, float] | None
    duplicates: int
    seconds: float
    extracting: float


def summarize(
    images: ImageSet, extractor: Extractor, batch: int = 50, keep: int | None = None
) -> Summary:
    """Run all images through the extractor once.

    keep: most features to keep, of evenly spaced images; None: all. Raises UserError if there are
    no images, or they are not uint8 RGB of one size, or features are not finite.
    """
    pooled, spatial, score = Moments(), Moments(), InceptionScore()
    kept, seen, shape, extracting = list[Tensor](), set[bytes](), (0, 0, 0), 0.0
    wanted = _spaced(images.number, keep)
    done, begun = 0, time.perf_counter()
    for part in _shown(images, batch):
        require_rgb(part.images, images.path)
        shape = part.images.shape[1:]
        before = time.perf_counter()
        try:
            found = extractor(torch.from_numpy(part.images.copy()))
        except UserError as error:
            last = done + len(part.images) - 1
            raise UserError(f"{images.path}, images {done} to {last}: {error}") from None
        found = found._replace(pooled=found.pooled.float().cpu())  # waits for the device
        extracting += time.perf_counter() - before
        pooled.add(found.pooled)
        if found.spatial is not None:
            spatial.add(found.spatial)
        if found.probabilities is not None:
            score.add(found.probabilities)
        kept.append(found.pooled[wanted[done : done + len(part.images)]])
        seen.update(hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in part[0])
        done += len(part.images)
    return Summary(
        number=images.number,
        shape=shape,
        pooled=pooled.gaussian(),
        spatial=spatial.gaussian() if spatial.number else None,
        features=torch.cat(kept),
        inception_score=score.read() if found.probabilities is not None else None,
        duplicates=images.number - len(seen),
        seconds=time.perf_counter() - begun,
        extracting=extracting,
    )


def _spaced(number: int, keep: int | None) -> Tensor:
    """Which of the images are kept, (number,) bool."""
    chosen = torch.ones(number, dtype=torch.bool)
    if keep is not None and keep < number:
        chosen.zero_()
        chosen[torch.arange(keep) * number // keep] = True
    return chosen


def _shown(images: ImageSet, batch: int) -> Iterator:
    with tqdm(total=images.number, unit="image", dynamic_ncols=True, disable=None) as bar:
        for part in batches(images, batch):
            yield part
            bar.update(len(part.images))
