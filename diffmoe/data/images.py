"""Images to read: class folders or tar shards in, square RGB arrays out."""

import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffmoe.data.captions import caption_lines
from diffmoe.data.tar_index import Entry, Member, read_member, tar_entries
from diffmoe.errors import UserError

# Those of torchvision's ImageFolder.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class ImageItem(NamedTuple):
    """One image: a file, or a member of a tar."""

    name: str  # within the folder of all images
    path: str
    label: int
    key: str
    member: Member | None = None
    txt: Member | None = None  # of a tar


def find_images(
    root: str | Path, captioned: bool = False
) -> tuple[list[ImageItem], list[str] | None]:
    """All images of a folder, and the names of its classes (None for tars, which have numbers).

    root: class folders (names sorted, as torchvision's ImageFolder does it; subfolders count), or
        uncompressed tars of KEY.jpg (or .png, ...) with KEY.cls.
    captioned: of images with captions, which need no classes (all have label 0, None is given):
        NAME.txt beside NAME.jpg at any depth, or KEY.txt in the tars.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--images {root} is no folder; give one of class folders or of tar shards")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    tars = sorted(file.name for file in root.glob("*.tar"))
    if captioned and not tars:
        items = [ImageItem(os.path.relpath(file, root), file, 0, "") for file in _files_below(root)]
        return _numbered(items), None
    if bool(classes) == bool(tars):
        found = f"{len(classes)} subfolders and {len(tars)} .tar files"
        raise UserError(f"--images {root} holds {found}; it must hold the one or the other")
    items: list[ImageItem] = []
    for tar in tars:
        items += _images_of_tar(root, tar, captioned)
    for label, name in enumerate(classes):
        files = _files_below(root / name)
        if not files:
            raise UserError(
                f"class folder {root / name} holds no image ({' '.join(EXTENSIONS)}); put some "
                "there, or remove it: every folder counts as a class"
            )
        items += [ImageItem(os.path.relpath(file, root), file, label, "") for file in files]
    return _numbered(items), None if captioned else classes or None


def load_image(item: ImageItem, size: int) -> np.ndarray:
    """Read, decode, crop: uint8 (size,size,3). Raises OSError or ValueError for a bad image."""
    data = member_bytes(item.path, item.member) if item.member else Path(item.path).read_bytes()
    try:
        with Image.open(io.BytesIO(data)) as image:
            if max(image.size) > 100 * min(image.size):
                raise ValueError(f"{image.width}x{image.height} pixels: too narrow for a square")
            return centre_crop(image.convert("RGB"), size)
    # PIL raises SyntaxError for broken PNG chunks.
    except (SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from None


def load_captions(item: ImageItem) -> list[str]:
    """The captions of an image. Raises OSError or ValueError where there are none."""
    if item.member is None:
        return caption_lines(Path(item.path).with_suffix(".txt").read_bytes())
    if item.txt is None:
        raise ValueError("no txt with captions")
    return caption_lines(member_bytes(item.path, item.txt))


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """DiT's (and ADM's) square of the middle, uint8 (size,size,3).

    The shorter side is halved by box averages while it is at least twice `size`, then brought to
    `size` by bicubic resampling; what is left over on the longer side is cut off evenly.
    """
    while min(image.size) >= 2 * size:
        width, height = image.size
        image = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


def index_tar(path: str | Path) -> tuple[list[Entry], list[bytes | None]]:
    """The samples of a tar, and the bytes of each one's `cls` (None where there is none)."""
    try:
        with open(path, "rb") as stream:
            file = stream.fileno()
            entries = tar_entries(file)
            labels = [
                read_member(file, entry.members["cls"]) if "cls" in entry.members else None
                for entry in entries
            ]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}; copy it again") from None
    return entries, labels


def label_of(where: str, text: bytes | None) -> int:
    """The class number in a `cls` member."""
    try:
        return int(text or b"")
    except ValueError:
        raise UserError(f"{where}.cls holds no class number but {text!r}; mend the tar") from None


def member_bytes(path: str | Path, member: Member) -> bytes:
    """Read one member of a tar."""
    with open(path, "rb") as stream:
        return read_member(stream.fileno(), member)


def _numbered(items: list[ImageItem]) -> list[ImageItem]:
    # Keys are numbers, because names may hold dots and spaces, which keys may not.
    return [item._replace(key=f"{number:08d}") for number, item in enumerate(items)]


def _images_of_tar(root: Path, tar: str, captioned: bool) -> list[ImageItem]:
    items = []
    for entry, text in zip(*index_tar(root / tar), strict=True):
        name = f"{tar}/{entry.key}"
        images = [m for kind, m in entry.members.items() if f".{kind}" in EXTENSIONS]
        if len(images) != 1:
            beside = "txt" if captioned else "cls"
            raise UserError(
                f"{root / name} has {len(images)} images, among {', '.join(entry.members)}; a "
                f"sample must have one ({' '.join(EXTENSIONS)}) and a {beside}"
            )
        label = 0 if captioned else label_of(str(root / name), text)
        txt = entry.members.get("txt")
        items.append(ImageItem(name, str(root / tar), label, "", images[0], txt))
    return items


def _files_below(folder: Path) -> list[str]:
    """The images of a class, in ImageFolder's order: folder by folder, names sorted."""
    return [
        os.path.join(place, file)
        for place, _, files in sorted(os.walk(folder, followlinks=True))
        for file in sorted(files)
        if file.lower().endswith(EXTENSIONS)
    ]
