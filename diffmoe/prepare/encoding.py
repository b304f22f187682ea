"""Images into shards: as pixels, or through an autoencoder as the moments of their posteriors."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from diffmoe.config import BYTES
from diffmoe.data.autoencoders import KLAutoencoder, canonical_name
from diffmoe.data.captions import CAPTION_BYTES, Captions
from diffmoe.data.manifest import Manifest, TextContent
from diffmoe.data.numbers import stored
from diffmoe.errors import UserError
from diffmoe.prepare.decoding import WHITE, Color
from diffmoe.prepare.images import ImageItem, find_images, load_captions, load_image
from diffmoe.prepare.sharding import Made, Skipped, convert_items
from diffmoe.redaction import printable
from diffmoe.work import Ranks


def encode_images(
    images: str | Path,
    directory: str | Path,
    *,
    vae: str | None,
    size: int,
    shards: int | None = None,
    batch: int = 32,
    workers: int = 4,
    dtype: str | None = None,
    flips: bool = True,
    classes: int | None = None,
    captions: bool = False,
    background: Color = WHITE,
    follow_links: bool = False,
    max_bad: int = 10,
    overwrite: bool = False,
    device: str = "cpu",
    ranks: Ranks = Ranks(),  # noqa: B008 (a tuple)
) -> Manifest | None:
    """Pack the images of a folder. Returns the manifest, or None while other ranks still work.

    vae: folder or hub id of an AutoencoderKL; None packs the pixels, -1..1.
    dtype: of the numbers in the files; by default uint8 of pixels, float16 of moments.
    flips: half of the samples shall be taken mirrored. The moments of mirrored images are stored
        for it; pixels are mirrored when they are read.
    size: side of the square that is cut out of each image.
    batch: images per pass of the autoencoder. workers: threads that decode images.
    classes: their number, where tars leave it open.
    captions: each image has some instead of a class, see `find_images`; they are packed as bytes.
    background: what transparent images are put on.
    follow_links: also those that lead out of the folder of images.
    """
    if size < 1 or batch < 1 or workers < 1:
        raise UserError(f"--size {size}, --batch {batch}, --workers {workers} must be at least 1")
    if dtype == "uint8" and vae is not None:
        raise UserError("--dtype uint8 is for --pixels; an autoencoder's moments are floats")
    dtype = dtype or ("uint8" if vae is None else "float16")
    items, names = find_images(images, captions, follow_links)
    if captions:
        classes = 1
    if names is None and classes is None:
        raise UserError(
            f"the tars of {images} hold class numbers, but not how many classes there are; give "
            "--classes N"
        )
    if names is not None and classes not in (None, len(names)):
        raise UserError(f"--classes {classes}, but {images} has {len(names)} class folders")
    autoencoder = None
    if vae is not None:
        # The same images must give the same bytes after a kill.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
        autoencoder = KLAutoencoder.with_own_scale(vae, device, batch)
    fields = {
        "content": "mean_logvar" if autoencoder else "sample",
        "scaled": autoencoder is None,
        "scale": autoencoder.scale if autoencoder else 1.0,
        "shift": autoencoder.shift if autoencoder else 0.0,
        "shape": autoencoder.latent_shape(size) if autoencoder else (3, size, size),
        "flips": flips,
        "mirrored": "stored" if autoencoder else "on_reading",
        "classes": len(names) if names is not None else classes,
        "class_names": names,
        "autoencoder": canonical_name(vae) if vae is not None else "identity",
        "source": f"images of {printable(str(Path(images).resolve()))}, {size}x{size}",
        "dtype": dtype,
        "text": TextContent(encoder=BYTES, length=CAPTION_BYTES) if captions else None,
    }

    def convert(part: Sequence[ImageItem]) -> Iterator[Made | Skipped]:
        for loaded in _loaded(part, size, batch, workers, captions, background):
            good = [found for found in loaded if isinstance(found, Loaded)]
            yield from (found for found in loaded if isinstance(found, Skipped))
            if not good:
                continue
            pixels = np.stack([found.pixels for found in good])
            arrays = _arrays(pixels, autoencoder)
            mirrored = None
            if flips and autoencoder is not None:
                mirrored = _arrays(pixels[:, :, ::-1].copy(), autoencoder)
            for index, (item, _, told) in enumerate(good):
                yield Made(
                    item.key,
                    item.label,
                    stored(arrays[index], dtype),
                    None if mirrored is None else stored(mirrored[index], dtype),
                    told,
                )

    return convert_items(
        directory,
        items,
        convert,
        fields=fields,
        shards=shards,
        settings={"batch": batch if autoencoder else None, "background": background},
        ranks=ranks,
        max_bad=max_bad,
        overwrite=overwrite,
    )


def _arrays(pixels: np.ndarray, autoencoder: KLAutoencoder | None) -> np.ndarray:
    """uint8 (N,H,W,3) to what the files hold, fp32: pixels (N,3,H,W) or moments (N,2C,h,w)."""
    if autoencoder is None:
        return pixels.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(127.5) - 1
    return autoencoder.encode(torch.from_numpy(pixels)).numpy()


class Loaded(NamedTuple):
    """A decoded image, uint8 (size,size,3), and its captions."""

    item: ImageItem
    pixels: np.ndarray
    captions: Captions | None


def _loaded(
    items: Sequence[ImageItem],
    size: int,
    batch: int,
    workers: int,
    captions: bool,
    background: Color,
) -> Iterator[list[Loaded | Skipped]]:
    """Batches of decoded images, or of why one cannot be; the next batch is read meanwhile."""

    def load(item: ImageItem) -> Loaded | Skipped:
        try:
            told = Captions(load_captions(item)) if captions else None
            return Loaded(item, load_image(item, size, background), told)
        except (OSError, ValueError) as error:
            return Skipped(item.name, f"{type(error).__name__}: {error}")

    parts = [items[start : start + batch] for start in range(0, len(items), batch)]
    with ThreadPoolExecutor(workers) as pool:  # PIL decodes and resizes without Python's lock
        ahead = deque([pool.submit(load, item) for item in part] for part in parts[:1])
        for part in [*parts[1:], []]:
            ahead.append([pool.submit(load, item) for item in part])
            yield [future.result() for future in ahead.popleft()]
