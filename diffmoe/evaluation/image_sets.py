"""Opens images to evaluate: sampled folders, npz files, shards of pixels, or image files."""

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
from diffmoe.files import does_not_exist
from diffmoe.npz_files import npz_rows, npz_shape, read_npz
from diffmoe.prepare.image_folders import EXTENSIONS, image_files, read_image
from diffmoe.prepare.images import WHITE, Color
from diffmoe.redaction import printable
from diffmoe.sampling.many_images import MANIFEST, read_manifest, shard_arrays


class Part(NamedTuple):
    """Consecutive images: uint8 (n, H, W, C), and their labels (n,) if they are known."""

    images: np.ndarray
    labels: np.ndarray | None

    @property
    def known_labels(self) -> np.ndarray:
        """The labels. Raises ValueError if there are none."""
        if self.labels is None:
            raise ValueError("these images have no labels")
        return self.labels


class ImageSet(NamedTuple):
    """Images that are read when they are needed.

    number: of images. about: their kind and path, and what the source records of itself. parts:
    reads them from the start, in order, some at a time.
    """

    number: int
    about: dict[str, Any]
    parts: Callable[[], Iterator[Part]]

    @property
    def path(self) -> str:
        """Where the images are, for messages."""
        return self.about["path"]

    def expect(self, number: int | None) -> "ImageSet":
        """The same images; raises UserError unless there are exactly `number` (None: any)."""
        if number is not None and number != self.number:
            raise UserError(
                f"{self.path} holds {self.number} images, but exactly {number} were requested"
            )
        return self

    def captions(self) -> list[str]:
        """The caption of each label. Raises UserError unless they were sampled from captions."""
        if "captions" not in self.about:
            raise UserError(
                f"{self.path} has no captions; give a folder that tools/sample.py "
                "filled from --prompts"
            )
        return self.about["captions"]


def open_images(path: str | Path, background: Color = WHITE) -> ImageSet:
    """Open a folder of samples, an ADM npz, shards of pixels, or a folder of image files.

    background: color behind transparent image files. Raises UserError for anything else, and if it
    is incomplete. `parts` raises UserError for files that cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"images {does_not_exist(path)}")
    if path.suffix == ".npz":
        return _adm(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder or .npz file of images")
    if (path / MANIFEST).exists() or (path / ".sampling").exists():
        return _samples(path)
    if (path / FILE_NAME).exists():
        return _shards(path)
    return _files(path, background)


def batches(images: ImageSet, size: int) -> Iterator[Part]:
    """Parts of at most `size` images. Raises UserError unless all are uint8 of one shape."""
    shape, seen = None, 0
    for part in images.parts():
        for start in range(0, len(part.images), size):
            some = part.images[start : start + size]
            if some.dtype != np.uint8:
                raise UserError(
                    f"{images.path} holds {some.dtype}; images are uint8, 0 to 255: "
                    "store them as they will be judged"
                )
            if shape is None:
                shape = some.shape[1:]
            if some.shape[1:] != shape:
                raise UserError(
                    f"{images.path}: image {seen} is {_size(some.shape[1:])}, those "
                    f"before {_size(shape)}; all must have one size"
                )
            seen += len(some)
            yield Part(some, None if part.labels is None else part.labels[start : start + size])
    if seen != images.number:
        raise UserError(f"{images.path} gave {seen} images instead of {images.number}")


def require_rgb(images: np.ndarray, path: str) -> None:
    """Raise UserError for gray or RGBA images, which extractors do not take."""
    if images.ndim != 4 or images.shape[3] != 3:
        raise UserError(
            f"{path} holds images of shape {images.shape[1:]}; extractors take RGB: "
            "(height, width, 3)"
        )


def _size(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _samples(folder: Path) -> ImageSet:
    """Samples of ours: checks that every index is there once; verifies checksums on reading."""
    file, manifest = folder / MANIFEST, read_manifest(folder)
    listed = [shard["file"] for shard in manifest["shards"]]
    stale = sorted({path.name for path in folder.glob("samples-*.npz")} - set(listed))
    if stale:
        raise UserError(f"{folder / stale[0]} is not listed in {MANIFEST}; remove it")
    if len(set(listed)) != len(listed):
        raise UserError(f"{file} lists a file twice; sample to another folder")
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
    """The format of ADM's evaluator: images in `arr_0`, labels in `arr_1` if there are any."""
    header = npz_shape(file, "arr_0")
    if header is None:
        raise UserError(f"{file} has no arr_0 with images")
    if not header or header[0] < 1:
        raise UserError(f"{file}: arr_0 of shape {header} holds no images")

    def parts() -> Iterator[Part]:
        labels, done = None, 0
        if npz_shape(file, "arr_1") is not None:
            labels = read_npz(file, "arr_1")["arr_1"]
            if labels.shape != header[:1]:
                raise UserError(f"{file}: arr_1 of shape {labels.shape} labels {header[0]} images")
        for images in npz_rows(file, "arr_0"):
            yield Part(images, None if labels is None else labels[done : done + len(images)])
            done += len(images)

    return ImageSet(header[0], {"kind": "npz", "path": str(file)}, parts)


def _shards(folder: Path) -> ImageSet:
    """Packed data whose latents are pixels, decoded, not mirrored."""
    manifest = Manifest.load(folder)
    if manifest.autoencoder != "identity":
        raise UserError(
            f"{folder} holds latents of {manifest.autoencoder}, not pixels; give the images that "
            "they were made of"
        )
    manifest.check(folder)
    decode = autoencoder_of(manifest.latent_spec, "cpu").decode

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
    """Image files in a folder and its subfolders, by name; if all are in subfolders, these are
    their classes. Symbolic links are followed: the images are only measured, never copied.
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

    about: dict[str, Any] = {"kind": "files", "path": str(folder)}
    if background != WHITE:
        about["background"] = background
    return ImageSet(len(files), about, _gathered(parts))


def _read(file: Path, background: Color) -> np.ndarray | str:
    """The image, (H,W,3) uint8, or why it cannot be read."""
    try:
        return np.asarray(read_image(file, background=background))
    except (OSError, ValueError) as error:
        return str(error)


def _unreadable(folder: Path, files: list[Path], first: int, background: Color) -> UserError:
    """The error for unreadable images; it counts all of them, so that they can be fixed at once."""
    found = ((file, _read(file, background)) for file in files[first:])
    bad = [f"{printable(str(file))} ({why})" for file, why in found if isinstance(why, str)]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return UserError(
        f"{len(bad)} of {len(files)} images of {printable(str(folder))} cannot be read: "
        f"{', '.join(bad[:3])}{more}; fix or remove them"
    )


def _gathered(one_by_one: Callable[[], Iterator[Part]], size: int = 50) -> Callable:
    """Parts of up to `size` images of one shape, from parts of one image."""

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
