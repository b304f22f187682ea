"""What samples are held against: statistics stored before, or images."""

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
from diffmoe.npz_files import npz_header, read_npz, write_npz
from diffmoe.prepare.images import WHITE, Color

# For precision, recall and KID; as many as the ImageNet reference of ADM holds.
KEPT_FEATURES = 10_000


class Reference(NamedTuple):
    """features: (k, d) for precision, recall and KID; None where only moments are known.

    about: where it is from, and which moments were used, stored or computed.
    """

    pooled: Gaussian
    spatial: Gaussian | None
    features: Tensor | None
    about: dict[str, Any]


def load_reference(
    path: str | Path, extractor: Extractor, batch: int = 50, background: Color = WHITE
) -> Reference:
    """From `store_reference`'s file, ADM's npz, or any images that `open_images` reads.

    ADM's mu, sigma, mu_s, sigma_s are Inception's of all training images, while its arr_0 holds
    some: with that extractor the stored ones are used, as in ADM's protocol. Raises UserError for
    statistics of another extractor.
    """
    path = Path(path)
    if path.suffix == ".npz":
        if npz_header(path, "about") is not None:
            return _stored(path, extractor)
        if npz_header(path, "mu") is not None and (
            extractor.is_inception or npz_header(path, "arr_0") is None
        ):
            return _adm(path, extractor, batch)
    return compute_reference(path, extractor, batch, background)


def check_reference(path: str | Path, extractor: Extractor) -> None:
    """Raise what `load_reference` would, as far as it can be told without reading images."""
    path = Path(path)
    if path.suffix == ".npz" and npz_header(path, "about") is not None:
        _stored(path, extractor)
    elif path.suffix == ".npz" and npz_header(path, "arr_0") is None:
        _adm(path, extractor, batch=1)  # which has no images to read
    else:
        open_images(path)


def compute_reference(
    path: str | Path, extractor: Extractor, batch: int = 50, background: Color = WHITE
) -> Reference:
    """Of all images of a folder or file; `background` is for transparent ones."""
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
    """Write an npz with ADM's names for the moments, the kept features, and `about` as JSON."""
    if file.suffix != ".npz":
        raise UserError(f"{file}: a reference's name ends in .npz")
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
        number, theirs = int(about["number"]), about["extractor"]
        told = _told(theirs)
        pooled = _gaussian(arrays, "", number)
        spatial = _gaussian(arrays, "_s", number) if "mu_s" in arrays else None
        features = torch.from_numpy(arrays["features"].copy())
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{file} is damaged ({error}); make it again: tools/evaluate.py reference"
        ) from None
    ours = {"name": extractor.name, "sha256": extractor.checksum}
    if theirs != ours:
        raise UserError(
            f"{file} holds statistics of the extractor {told}, not of {_told(ours)}; "
            f"take --extractor {theirs['name']}, or make a reference with {ours['name']}"
        )
    moments = f"stored by tools/evaluate.py reference, of {number} images"
    return Reference(pooled, spatial, features, about | {"path": str(file), "moments": moments})


def _adm(file: Path, extractor: Extractor, batch: int) -> Reference:
    if not extractor.is_inception:
        raise UserError(
            f"{file} holds no images (arr_0) but Inception's mu and sigma alone; they do not fit "
            f"{extractor.name}: give images, or --extractor inception-2015-12-05.pt"
        )
    arrays = read_npz(file, "mu", "sigma", "mu_s", "sigma_s")
    try:
        pooled = _gaussian(arrays, "", None)
        spatial = _gaussian(arrays, "_s", None) if "mu_s" in arrays else None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: mu and sigma cannot be read ({error})") from None
    about = {"path": str(file), "moments": "stored in it (mu, sigma, mu_s, sigma_s)"}
    if npz_header(file, "arr_0") is None:
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


def _told(extractor: dict[str, Any]) -> str:
    return f"{extractor['name']} ({(extractor['sha256'] or 'no checksum')[:12]})"
