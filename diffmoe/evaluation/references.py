"""What samples are compared with: stored statistics, or images."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.evaluation.extractors import Extractor
from diffmoe.evaluation.image_sets import open_images
from diffmoe.evaluation.moments import Gaussian
from diffmoe.evaluation.summary import summarize
from diffmoe.npz_files import npz_shape, read_npz, write_npz
from diffmoe.prepare.images import WHITE, Color

# For precision, recall and KID; as many as in ADM's ImageNet reference.
KEPT_FEATURES = 10_000


class Reference(NamedTuple):
    """Statistics of a set of images.

    features: (k, d) for precision, recall and KID; None if only moments are known. about: their
    origin, and whether moments were stored or computed.
    """

    pooled: Gaussian
    spatial: Gaussian | None
    features: Tensor | None
    about: dict[str, Any]


def load_reference(
    path: str | Path, extractor: Extractor, batch: int = 50, background: Color = WHITE
) -> Reference:
    """Load a file of `store_reference`, ADM's npz, or any images that `open_images` reads.

    ADM's mu, sigma, mu_s, sigma_s are Inception's of all training images, its arr_0 holds some of
    them: with that extractor the stored moments are used, as in ADM's protocol. Raises UserError
    for statistics of another extractor.
    """
    path = Path(path)
    if path.suffix == ".npz":
        if npz_shape(path, "about") is not None:
            return _stored(path, extractor)
        if npz_shape(path, "mu") is not None and (
            extractor.is_inception or npz_shape(path, "arr_0") is None
        ):
            return _adm(path, extractor, batch)
    return compute_reference(path, extractor, batch, background)


def check_reference(path: str | Path, extractor: Extractor) -> None:
    """Raise what `load_reference` would, as far as possible without reading images."""
    path = Path(path)
    if path.suffix == ".npz" and npz_shape(path, "about") is not None:
        _stored(path, extractor)
    elif path.suffix == ".npz" and npz_shape(path, "arr_0") is None:
        _adm(path, extractor, batch=1)  # which has no images to read
    else:
        open_images(path)


def compute_reference(
    path: str | Path, extractor: Extractor, batch: int = 50, background: Color = WHITE
) -> Reference:
    """Compute statistics of all images of a folder or file. background: of transparent ones."""
    images = open_images(path, background)
    found = summarize(images, extractor, batch, keep=KEPT_FEATURES)
    about = {
        "path": str(path),
        "moments": "computed from its images",
        "number": found.number,
        "image_shape": list(found.shape),
        "extractor": {"name": extractor.name, "sha256": extractor.checksum},
        "source": images.about,
    }
    return Reference(found.pooled, found.spatial, found.features, about)


def store_reference(file: Path, reference: Reference) -> None:
    """Write an npz with ADM's names for the moments, the features, and `about` as JSON.

    Raises UserError for a reference without features, or another suffix.
    """
    if file.suffix != ".npz":
        raise UserError(f"{file}: the name must end in .npz")
    if reference.features is None:
        raise UserError(f"{reference.about['path']} has only moments; give images")
    arrays = _moments("", reference.pooled)
    if reference.spatial is not None:
        arrays |= _moments("_s", reference.spatial)
    arrays["features"] = reference.features.numpy()
    arrays["about"] = np.array(json.dumps(reference.about))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_npz(file, arrays)


def _moments(suffix: str, gaussian: Gaussian) -> dict[str, np.ndarray]:
    return {f"mu{suffix}": gaussian.mean.numpy(), f"sigma{suffix}": gaussian.covariance.numpy()}


def _stored(file: Path, extractor: Extractor) -> Reference:
    try:
        arrays = read_npz(file)
        about = json.loads(str(arrays["about"]))
        number, stored = int(about["number"]), about["extractor"]
        name = _describe(stored)
        pooled = _gaussian(arrays, "", number)
        spatial = _gaussian(arrays, "_s", number) if "mu_s" in arrays else None
        features = torch.from_numpy(arrays["features"].copy())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} is damaged ({error}); make it again: tools/evaluate.py reference"
        ) from None
    requested = {"name": extractor.name, "sha256": extractor.checksum}
    if stored != requested:
        raise UserError(
            f"{file} has statistics of the extractor {name}, not of {_describe(requested)}; choose "
            f"--extractor {stored['name']}, or make a reference with {extractor.name}"
        )
    moments = f"stored by tools/evaluate.py reference, of {number} images"
    return Reference(pooled, spatial, features, about | {"path": str(file), "moments": moments})


def _adm(file: Path, extractor: Extractor, batch: int) -> Reference:
    if not extractor.is_inception:
        raise UserError(
            f"{file} has no images (arr_0), only Inception's mu and sigma, which do not fit "
            f"{extractor.name}: give images, or --extractor inception-2015-12-05.pt"
        )
    arrays = read_npz(file, "mu", "sigma", "mu_s", "sigma_s")
    try:
        pooled = _gaussian(arrays, "", None)
        spatial = _gaussian(arrays, "_s", None) if "mu_s" in arrays else None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: mu and sigma cannot be read ({error})") from None
    about: dict[str, Any] = {
        "path": str(file),
        "moments": "stored in it (mu, sigma, mu_s, sigma_s)",
    }
    if npz_shape(file, "arr_0") is None:
        return Reference(pooled, spatial, None, about)
    found = summarize(open_images(file), extractor, batch, keep=KEPT_FEATURES)
    about |= {"image_shape": list(found.shape), "features": f"of {found.number} images, its arr_0"}
    return Reference(pooled, spatial, found.features, about)


def _gaussian(arrays: Any, suffix: str, number: int | None) -> Gaussian:
    mean, covariance = (
        torch.from_numpy(np.array(arrays[f"{name}{suffix}"], dtype=np.float64))
        for name in ("mu", "sigma")
    )
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"sigma{suffix} {tuple(covariance.shape)} of mu {tuple(mean.shape)}")
    return Gaussian(mean, covariance, number)


def _describe(extractor: dict[str, Any]) -> str:
    return f"{extractor['name']} ({(extractor['sha256'] or 'no checksum')[:12]})"
