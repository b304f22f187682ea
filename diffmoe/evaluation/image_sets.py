"""Images to evaluate, a batch at a time, from what sampling, others' tools or packing wrote."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffmoe.data.autoencoders import autoencoder_of
from diffmoe.data.latents import model_latents
from diffmoe.data.manifest import FILE_NAME, Manifest
from diffmoe.data.reading import read_shard
from diffmoe.errors import UserError
from diffmoe.npz_files import npz_header, npz_rows, read_npz
from diffmoe.prepare.image_folders import EXTENSIONS, image_files, read_image
from diffmoe.prepare.images import WHITE, Color
from diffmoe.redaction import printable
from diffmoe.sampling.many_images import MANIFEST, read_manifest, shard_arrays


class Part(NamedTuple):
    """Some consecutive images: uint8 (n, H, W, C), and their labels (n,) where they are known."""

    images: np.ndarray
    labels: np.ndarray | None


class ImageSet(NamedTuple):
    """number: of images. about: kind and place, and all that the source tells of itself.

    parts: reads them anew, in order, never all at once.
    """

    number: int
    about: dict[str, Any]
    parts: Callable[[], Iterator[Part]]

    def expect(self, number: int | None) -> "ImageSet":
        """Itself; raises UserError unless it holds exactly so many (None: any)."""
        if number is not None and number != self.number:
            raise UserError(
                f"{self.about['path']} holds {self.number} images, {number} were asked for; "
                "figures need the exact number"
            )
        return self

    def captions(self) -> list[str]:
        """The caption of each label. Raises UserError unless they are samples of captions."""
        if "captions" not in self.about:
            raise UserError(
                f"{self.about['path']} tells of no captions; give a folder that tools/sample.py "
                "filled from --prompts"
            )
        return self.about["captions"]


def open_images(path: str | Path, background: Color = WHITE) -> ImageSet:
    """The images of a folder of our samples, an ADM npz, our shards of pixels, or image files.

    background: what transparent image files are put on.
    Raises UserError for what is none of these, or is incomplete; `parts` raises it for images that
    are not uint8 RGB, or not all of one size, and for files that cannot be read.
    """
    path = Path(path)
    if path.suffix == ".npz":
        return _adm(path)
    if not path.is_dir():
        raise UserError(f"{path} is neither a folder nor an .npz file; give images")
    if (path / MANIFEST).exists() or (path / ".sampling").exists():
        return _samples(path)
    if (path / FILE_NAME).exists():
        return _shards(path)
    return _files(path, background)


def batches(images: ImageSet, size: int) -> Iterator[Part]:
    """Parts of at most `size` images, all of the first one's shape. Raises UserError otherwise."""
    shape, seen = None, 0
    for part in images.parts():
        for start in range(0, len(part.images), size):
            some = part.images[start : start + size]
            if some.dtype != np.uint8:
                raise UserError(
                    f"{images.about['path']} holds {some.dtype}; images are uint8, 0 to 255: "
                    "store them as they will be judged"
                )
            if shape is None:
                shape = some.shape[1:]
            if some.shape[1:] != shape:
                raise UserError(
                    f"{images.about['path']}: image {seen} is {_size(some.shape[1:])}, those "
                    f"before {_size(shape)}; give images of one size"
                )
            seen += len(some)
            yield Part(some, None if part.labels is None else part.labels[start : start + size])
    if seen != images.number:
        raise UserError(f"{images.about['path']} gave {seen} images instead of {images.number}")


def require_rgb(images: np.ndarray, path: str) -> None:
    """Raises UserError for gray or RGBA images, which extractors do not take."""
    if images.ndim != 4 or images.shape[3] != 3:
        raise UserError(
            f"{path} holds images of shape {images.shape[1:]}; extractors take RGB: "
            "(height, width, 3)"
        )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _samples(folder: Path) -> ImageSet:
    """Every index once, no file that the manifest does not list, checksums when read."""
    file, manifest = folder / MANIFEST, read_manifest(folder)
    listed = [shard["file"] for shard in manifest["shards"]]
    stale = sorted({path.name for path in folder.glob("samples-*.npz")} - set(listed))
    if stale:
        raise UserError(f"{folder / stale[0]} is not of these samples; remove it: {MANIFEST} rules")
    if len(set(listed)) != len(listed):
        raise UserError(f"{file} lists a file twice; sample into another folder")
    indices = []
    for name in listed:
        if not (folder / name).exists():
            raise UserError(f"{folder / name} is missing or damaged; sample into another folder")
        found = read_npz(folder / name, "indices").get("indices")
        if found is None or found.ndim != 1 or found.dtype.kind not in "iu":
            raise UserError(f"{folder / name} holds no indices; sample into another folder")
        indices.append(found)
    found = np.sort(np.concatenate(indices))
    whole = len(found) == manifest["number"]
    if not (whole and np.array_equal(found, np.arange(len(found)))):
        raise UserError(
            f"{folder} holds {len(np.unique(found))} different of {manifest['number']} samples; "
            "sample into another folder"
        )
    about = {name: value for name, value in manifest.items() if name != "shards"}
    return ImageSet(
        manifest["number"],
        {"kind": "samples", "path": str(folder), **about},
        lambda: (Part(*arrays) for arrays in shard_arrays(folder, check=True)),
    )


def _adm(file: Path) -> ImageSet:
    """`arr_0` and, where it is there, `arr_1`, of ADM's evaluator."""
    header = npz_header(file, "arr_0")
    if header is None:
        raise UserError(f"{file} holds no arr_0, so no images")
    if not header or header[0] < 1:
        raise UserError(f"{file}: arr_0 of shape {header} holds no images")

    def parts() -> Iterator[Part]:
        labels, done = None, 0
        if npz_header(file, "arr_1") is not None:
            labels = read_npz(file, "arr_1")["arr_1"]
            if labels.shape != header[:1]:
                raise UserError(f"{file}: arr_1 of shape {labels.shape} labels {header[0]} images")
        for images in npz_rows(file, "arr_0"):
            yield Part(images, None if labels is None else labels[done : done + len(images)])
            done += len(images)

    return ImageSet(header[0], {"kind": "npz", "path": str(file)}, parts)


def _shards(folder: Path) -> ImageSet:
    """Of packed data whose latents are pixels, as the model sees them, without mirroring."""
    manifest = Manifest.load(folder)
    if manifest.autoencoder != "identity":
        raise UserError(
            f"{folder} holds latents of {manifest.autoencoder}, not pixels; give the images that "
            "they were made of"
        )
    manifest.check(folder)
    decode = autoencoder_of(manifest.model_dump(), "cpu").decode

    def parts() -> Iterator[Part]:
        for shard in manifest.shards:
            samples = read_shard(manifest.address(folder, shard), manifest)
            # Pixels have no posterior: nothing is drawn.
            latents = model_latents([s.array for s in samples], manifest, torch.Generator())
            yield Part(decode(latents).numpy(), np.array([s.label for s in samples]))

    return ImageSet(
        manifest.samples,
        {"kind": "shards", "path": str(folder), "source": manifest.source},
        parts,
    )


def _files(folder: Path, background: Color) -> ImageSet:
    """Image files below a folder, by name; where all lie in subfolders, these are the classes.

    Links are followed wherever they lead: nothing but figures comes of it.
    """
    files = sorted(Path(file) for file in image_files(folder, follow_links=True))
    if not files:
        raise UserError(f"{folder} holds no images ({' '.join(EXTENSIONS)}), shards or samples")
    names = sorted({file.relative_to(folder).parts[0] for file in files})
    numbered = {name: number for number, name in enumerate(names)}
    classed = all(len(file.relative_to(folder).parts) > 1 for file in files)

    def parts() -> Iterator[Part]:
        for number, file in enumerate(files):
            label = np.array([numbered[file.relative_to(folder).parts[0]]]) if classed else None
            image = _read(file, background)
            if isinstance(image, str):
                raise _unreadable(folder, files, number, background)
            yield Part(image[None], label)

    about = {"kind": "files", "path": str(folder)}
    if background != WHITE:
        about["background"] = background
    return ImageSet(len(files), about, _gathered(parts))


def _read(file: Path, background: Color) -> np.ndarray | str:
    """The image, (H,W,3) uint8, or why there is none."""
    try:
        return np.asarray(read_image(file, background=background))
    except (OSError, ValueError) as error:
        return str(error)


def _unreadable(folder: Path, files: list[Path], first: int, background: Color) -> UserError:
    """What is said of bad images: of all at once, since figures need every one mended."""
    found = ((file, _read(file, background)) for file in files[first:])
    bad = [f"{printable(str(file))} ({why})" for file, why in found if isinstance(why, str)]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return UserError(
        f"{len(bad)} of {len(files)} images of {printable(str(folder))} cannot be read: "
        f"{', '.join(bad[:3])}{more}; mend or remove them"
    )


def _gathered(one_by_one: Callable[[], Iterator[Part]], size: int = 50) -> Callable:
    """Parts of one image each, joined while they have the same shape."""

    def joined(held: list[Part]) -> Part:
        labels = None if held[0].labels is None else np.concatenate([p.labels for p in held])
        return Part(np.concatenate([p.images for p in held]), labels)

    def parts() -> Iterator[Part]:
        held: list[Part] = []
        for part in one_by_one():
            if len(held) == size or (held and held[0].images.shape != part.images.shape):
                yield joined(held)
                held = []
            held.append(part)
        yield joined(held)

    return parts
