"""Images into shards: as pixels, or through an autoencoder as the moments of their posteriors."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from diffmoe.config import BYTES, Size, sides
from diffmoe.data.autoencoders import DiffusersAutoencoder, canonical_name
from diffmoe.data.captions import Captions
from diffmoe.data.latents import NotFinite, Sample, model_latents, to_stored
from diffmoe.data.manifest import CAPTION_BYTES, FILE_NAME, Manifest, TextContent
from diffmoe.errors import UserError
from diffmoe.prepare.image_folders import (
    ImageItem,
    ImageSource,
    check_label,
    find_images,
    load_captions,
    load_image,
)
from diffmoe.prepare.plain_tars import PlainTars
from diffmoe.prepare.sharding import ShardOutput, Skipped, convert_items
from diffmoe.prepare.tables import find_table_images, holds_tables
from diffmoe.redaction import printable
from diffmoe.seeding import keyed_generator

_ROUND_TRIPS = 16  # images whose PSNR is reported


@dataclass(frozen=True)
class Encoding:
    """What is stored of each image.

    size: of the crop in pixels, of a square or (height, width).
    vae: folder or hub id of an autoencoder of diffusers; None stores the pixels, -1..1.
    dtype: of the stored numbers; None: uint8 for pixels, float16 for moments.
    flips: half of the samples are to be mirrored in training. For that the moments of the mirrored
        images are stored, too; pixels are mirrored on reading.
    """

    size: Size
    vae: str | None = None
    dtype: str | None = None
    flips: bool = True

    @property
    def stored_dtype(self) -> str:
        """dtype with its default filled in."""
        return self.dtype or ("uint8" if self.vae is None else "float16")


class Loaded(NamedTuple):
    """A decoded image, uint8 (height,width,3), and its captions."""

    item: ImageItem
    pixels: np.ndarray
    captions: Captions | None


def encode_images(
    images: ImageSource,
    encoding: Encoding,
    output: ShardOutput,
    *,
    batch: int = 32,
    workers: int = 4,
    device: str | torch.device = "cpu",
    report: Callable[[str], object] = lambda line: None,
) -> Manifest | None:
    """Pack the images of a folder. Returns the manifest, or None while other ranks still work.

    batch: images per pass of the autoencoder. workers: threads that decode images.
    report: is told, by the first rank, how well the autoencoder gives back some of the images.
    Captions are packed as bytes. Raises UserError.
    """
    (height, width), vae, dtype = sides(encoding.size), encoding.vae, encoding.stored_dtype
    if min(height, width, batch, workers) < 1:
        raise UserError(
            f"--size {height}x{width}, --batch {batch}, --workers {workers} must be at least 1"
        )
    if dtype == "uint8" and vae is not None:
        raise UserError("--dtype uint8 is for --pixels; an autoencoder's moments are floats")
    autoencoder = None
    if vae is not None:
        # A resumed command must give the same bytes for the same images.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        autoencoder = DiffusersAutoencoder.with_own_scale(vae, device, batch)
    shape, draws = (3, height, width), False
    if autoencoder is not None:
        shape, draws = autoencoder.describe(height, width)
    plain = PlainTars(Path(output.directory) / ".unpacked", output.ranks)
    items, class_names = _find(images, plain)
    if not items:
        raise UserError(f"--images {images.folder} holds no images")
    classes = _number_of_classes(images, class_names)
    for item in items:
        check_label(f"--images {images.folder}: {item.name}", item.label, classes)
    fields = {
        "content": "mean_logvar" if draws else "sample",
        "scaled": autoencoder is None,
        "scale": autoencoder.scale if autoencoder else 1.0,
        "shift": autoencoder.shift if autoencoder else 0.0,
        "shape": shape,
        "flips": encoding.flips,
        "mirrored": "stored" if autoencoder else "on_reading",
        "classes": classes,
        "class_names": class_names,
        "autoencoder": canonical_name(vae) if vae is not None else "identity",
        "pixel_range": autoencoder.pixel_range if autoencoder else (-1.0, 1.0),
        "source": f"images of {printable(str(Path(images.folder).resolve()))}, {height}x{width}",
        "dtype": dtype,
        "text": TextContent(encoder=BYTES, length=CAPTION_BYTES) if images.captioned else None,
    }

    def convert(part: Sequence[ImageItem]) -> Iterator[Sample | Skipped]:
        for results in _load_batches(part, images, encoding.size, batch, workers):
            yield from (result for result in results if isinstance(result, Skipped))
            loaded = [result for result in results if isinstance(result, Loaded)]
            if not loaded:
                continue
            pixels = np.stack([image.pixels for image in loaded])
            arrays = _arrays(pixels, autoencoder)
            flips = None
            if encoding.flips and autoencoder is not None:
                flips = _arrays(pixels[:, :, ::-1].copy(), autoencoder)
            for index, (item, _, captions) in enumerate(loaded):
                yield Sample(
                    item.key,
                    item.label,
                    to_stored(arrays[index], dtype),
                    None if flips is None else to_stored(flips[index], dtype),
                    captions,
                )

    if (
        autoencoder is not None
        and output.ranks.rank == 0
        and not (Path(output.directory) / FILE_NAME).exists()
    ):
        some = items[:: -(-len(items) // _ROUND_TRIPS)]
        parts = _load_batches(some, images, encoding.size, batch, workers)
        pixels = [image.pixels for part in parts for image in part if isinstance(image, Loaded)]
        # Latents that do not fit into the stored type are reported when they are packed.
        with contextlib.suppress(NotFinite):
            report(_round_trip(pixels, autoencoder, Manifest(shards=[], **fields)))
    settings = {
        "batch": batch if autoencoder else None,
        "background": images.background,
        "split": images.split,
        "columns": images.columns or None,
    }
    manifest = convert_items(items, convert, fields, output, settings)
    if manifest is not None:
        plain.remove()
    return manifest


def _find(images: ImageSource, plain: PlainTars) -> tuple[list[ImageItem], list[str] | None]:
    """The images and the names of their classes, whatever holds them."""
    if holds_tables(images.folder):
        return find_table_images(images, plain)
    if images.split is not None or images.columns:
        raise UserError(f"{images.folder} holds no tables, which --split and --columns are for")
    return find_images(images.folder, images.captioned, images.follow_links, plain)


def _number_of_classes(images: ImageSource, class_names: list[str] | None) -> int:
    if images.captioned:
        return 1
    if class_names is None:
        if images.classes is None:
            raise UserError(
                f"{images.folder} holds class numbers but not how many classes there are; give "
                "--classes N"
            )
        return images.classes
    if images.classes not in (None, len(class_names)):
        raise UserError(
            f"--classes {images.classes}, but {images.folder} has {len(class_names)} classes"
        )
    return len(class_names)


def _round_trip(
    images: list[np.ndarray], autoencoder: DiffusersAutoencoder, manifest: Manifest
) -> str:
    """A line with the mean PSNR of images (H,W,3) that are encoded, stored, drawn and decoded."""
    if not images:
        return "none of the first images can be read"
    pixels = np.stack(images)
    arrays = list(to_stored(_arrays(pixels, autoencoder), manifest.dtype or "float32"))
    latents = model_latents(arrays, manifest, keyed_generator(0, "round trip"))
    errors = (autoencoder.decode(latents).numpy() - pixels.astype(np.float64)) ** 2
    # An image without any error counts as one with errors of half a level.
    errors = np.maximum(errors.mean((1, 2, 3)), 0.25)
    psnr = (10 * np.log10(255**2 / errors)).mean()
    return f"PSNR of {len(images)} images through the autoencoder and back: {psnr:.1f} dB"


def _arrays(pixels: np.ndarray, autoencoder: DiffusersAutoencoder | None) -> np.ndarray:
    """uint8 (N,H,W,3) to fp32 pixels (N,3,H,W) in -1..1, or what `encode` gives."""
    if autoencoder is None:
        return pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
    return autoencoder.encode(torch.from_numpy(pixels)).numpy()


def _load_batches(
    items: Sequence[ImageItem], images: ImageSource, size: Size, batch: int, workers: int
) -> Iterator[list[Loaded | Skipped]]:
    """Batches of decoded images and of the reasons why others cannot be; reads one batch ahead."""

    def load(item: ImageItem) -> Loaded | Skipped:
        try:
            captions = Captions(load_captions(item)) if images.captioned else None
            return Loaded(item, load_image(item, size, images.background), captions)
        except (OSError, ValueError) as error:
            return Skipped(item.name, f"{type(error).__name__}: {error}")

    parts = [items[start : start + batch] for start in range(0, len(items), batch)]
    with ThreadPoolExecutor(workers) as pool:  # PIL decodes and resizes without the GIL
        ahead: deque[list[Future[Loaded | Skipped]]] = deque()
        ahead.extend([pool.submit(load, item) for item in part] for part in parts[:1])
        for part in [*parts[1:], []]:
            ahead.append([pool.submit(load, item) for item in part])
            yield [future.result() for future in ahead.popleft()]
