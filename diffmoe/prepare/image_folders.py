"""Folders of images: class folders, tar shards, images of one class, images with captions.

Only regular files are opened: a pipe or a device with an image's name counts as a bad image.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffmoe.config import Size
from diffmoe.data.captions import caption_lines
from diffmoe.data.tar_index import Entry, Member, read_member, tar_entries
from diffmoe.errors import UserError
from diffmoe.files import contained, does_not_exist, open_regular, read_bytes
from diffmoe.prepare.images import WHITE, Color, center_crop, decode_image
from diffmoe.prepare.plain_tars import COMPRESSED, PlainTars
from diffmoe.redaction import printable

# Those of torchvision's ImageFolder, of animations and phones, rarer names of the same formats, and
# formats that cannot be read but must be told.
EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".gif", ".avif", ".heic", ".heif"),
    *(".jfif", ".jpe", ".apng", ".pbm", ".pnm"),
    *(".jp2", ".jxl"),
)
# Files are read whole before they are decoded; larger ones are refused without being read.
_MAX_IMAGE_BYTES = 512 << 20
_MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True)
class ImageSource:
    """The images to pack and how to read them.

    folder: see `find_images` and `find_table_images`.
    classes: their number, needed where labels have no names and there are no captions.
    captioned: each image has captions instead of a class.
    background: the color behind transparent images.
    follow_links: also follow links that lead out of the folder.
    split, columns: of tables; `columns` has their names by "image", "label" or "text".
    """

    folder: str | Path
    classes: int | None = None
    captioned: bool = False
    background: Color = WHITE
    follow_links: bool = False
    split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


class ImageItem(NamedTuple):
    """One image: a file, or a member of a tar."""

    name: str  # relative to the folder of all images, made `printable`
    path: str
    label: int
    key: str
    member: Member | None = None
    txt: Member | None = None  # the captions, in a tar


def find_images(
    root: str | Path,
    captioned: bool = False,
    follow_links: bool = False,
    plain: PlainTars | None = None,
) -> tuple[list[ImageItem], list[str] | None]:
    """All images of a folder, and its class names (None for tars, whose classes are numbers).

    root: class folders (sorted by name as in torchvision's ImageFolder, subfolders included), or
        tars of KEY.jpg (or .png, ...) with KEY.cls, or images alone, which are one class of the
        folder's name.
    plain: unpacks compressed tars; None refuses them.
    captioned: the images have captions instead of classes: NAME.txt beside NAME.jpg at any depth,
        or KEY.txt in the tars. All labels are 0 and the class names are None.
    follow_links: see `image_files`.

    Raises UserError for a folder of any other form and for links that must not be followed.
    """
    root = Path(root)
    if not root.exists():
        raise UserError(f"--images {does_not_exist(root)}")
    if not root.is_dir():
        raise UserError(f"--images {root} is not a folder; give one of images or tars")
    out = None if follow_links else root
    classes, files = _listed(str(root), out)
    tars = [name for name in files if name.endswith((".tar", *COMPRESSED))]
    if captioned and not tars:
        return numbered([_of_file(root, file, 0) for file in _images_below(root, out)]), None
    images = [name for name in files if name.lower().endswith(EXTENSIONS)]
    if bool(classes) + bool(tars) + bool(images) != 1:
        raise UserError(
            f"--images {root} holds {len(classes)} subfolders, {len(tars)} tar files and "
            f"{len(images)} images; it must hold class folders, tars, or images of one class, and "
            "nothing of the others"
        )
    if images:
        flat = [_of_file(root, str(root / name), 0) for name in images]
        return numbered(flat), [printable(root.resolve().name)]
    items: list[ImageItem] = []
    paths = [root / tar for tar in tars]
    for tar, path in zip(tars, plain.unpacked(paths) if plain else paths, strict=True):
        items += images_of_tar(path, root, tar, captioned)
    for label, name in enumerate(classes):
        inside = _images_below(root / name, out)
        if not inside:
            raise UserError(
                f"class folder {printable(str(root / name))} holds no image "
                f"({' '.join(EXTENSIONS)}); add images or remove it: every folder counts as a class"
            )
        items += [_of_file(root, file, label) for file in inside]
    names = None if captioned else [printable(name) for name in classes] or None
    return numbered(items), names


def image_files(folder: str | Path, follow_links: bool = False) -> list[str]:
    """The images below a folder in ImageFolder's order: folder by folder, sorted by name.

    follow_links: also follow links that lead out of the folder, which are refused otherwise.
    Raises UserError for a folder that cannot be listed, a broken link, and a loop of links.
    """
    return _images_below(folder, None if follow_links else Path(folder))


def read_image(
    path: str | Path, member: Member | None = None, background: Color = WHITE
) -> Image.Image:
    """An image file, or a member of a tar, as RGB. Raises OSError or ValueError if it is bad."""
    data = read_bytes(path, _MAX_IMAGE_BYTES) if member is None else member_bytes(path, member)
    return decode_image(data, background)


def load_image(item: ImageItem, size: Size, background: Color = WHITE) -> np.ndarray:
    """Read, decode and crop: uint8 (height,width,3). Raises OSError or ValueError if it is bad."""
    image = read_image(item.path, item.member, background)
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"{image.width}x{image.height} pixels: too narrow to crop")
    return center_crop(image, size)


def load_captions(item: ImageItem) -> list[str]:
    """The captions of an image. Raises OSError or ValueError if there are none."""
    if item.member is None:
        return caption_lines(read_bytes(Path(item.path).with_suffix(".txt"), _MAX_TEXT_BYTES))
    if item.txt is None:
        raise ValueError("there is no txt with captions")
    return caption_lines(member_bytes(item.path, item.txt, _MAX_TEXT_BYTES))


def index_tar(path: Path, shown: Path) -> tuple[list[Entry], list[bytes | None]]:
    """The samples of a plain tar and the bytes of each one's `cls` (None if it has none).

    shown: what it was unpacked from, or itself; errors name it. Raises UserError.
    """
    try:
        with open_regular(path) as stream:
            file = stream.fileno()
            entries = tar_entries(file)
            labels = [
                _bytes_of(file, entry.members["cls"], _MAX_TEXT_BYTES)
                if "cls" in entry.members
                else None
                for entry in entries
            ]
    except (OSError, ValueError) as error:
        raise UserError(f"{shown} cannot be read: {error}; copy it again") from None
    return entries, labels


def label_of(where: str, text: bytes | None) -> int:
    """The class number in a `cls` member."""
    try:
        return int(text or b"")
    except ValueError:
        raise UserError(
            f"{where}.cls holds {text and text[:20]!r}, not a class number; fix the tar"
        ) from None


def check_label(where: str, label: int, classes: int) -> None:
    """Raise UserError for a label that is none of the classes."""
    if not 0 <= label < classes:
        raise UserError(
            f"{where}: label {label} is outside the classes 0..{classes - 1}; fix it or give "
            "another --classes"
        )


def member_bytes(path: str | Path, member: Member, limit: int = _MAX_IMAGE_BYTES) -> bytes:
    """Read one member of a tar. Raises ValueError if it is larger than `limit` bytes."""
    with open_regular(path) as stream:
        return _bytes_of(stream.fileno(), member, limit)


def _bytes_of(file: int, member: Member, limit: int) -> bytes:
    if member.size > limit:
        raise ValueError(f"{member.size:,} bytes are too many; the limit is {limit:,}")
    return read_member(file, member)


def numbered(items: list[ImageItem]) -> list[ImageItem]:
    """With keys: numbers, because names may contain dots and spaces and keys may not."""
    return [item._replace(key=f"{number:08d}") for number, item in enumerate(items)]


def _of_file(root: Path, file: str, label: int) -> ImageItem:
    return ImageItem(printable(os.path.relpath(file, root)), file, label, "")


def images_of_tar(tar: Path, root: Path, name: str, captioned: bool) -> list[ImageItem]:
    """The samples of a plain tar, without keys. root/name: what it was made of, or itself."""
    items = []
    for entry, text in zip(*index_tar(tar, root / name), strict=True):
        sample = printable(f"{name}/{entry.key}")
        images = [m for kind, m in entry.members.items() if f".{kind}" in EXTENSIONS]
        if len(images) != 1:
            beside = "txt" if captioned else "cls"
            raise UserError(
                f"{root / sample} has {len(images)} images, among {', '.join(entry.members)}; a "
                f"sample must have one ({' '.join(EXTENSIONS)}) and a {beside}"
            )
        label = 0 if captioned else label_of(str(root / sample), text)
        txt = entry.members.get("txt")
        items.append(ImageItem(sample, str(tar), label, "", images[0], txt))
    return items


def _images_below(folder: str | Path, root: Path | None) -> list[str]:
    return [
        os.path.join(place, file)
        for place, files in sorted(_folders(str(folder), root))
        for file in files
        if file.lower().endswith(EXTENSIONS)
    ]


def _folders(folder: str, root: Path | None) -> Iterator[tuple[str, list[str]]]:
    """The folder and all folders below it, each with its file names, in no particular order."""
    waiting: list[tuple[str, dict]] = [(folder, {})]
    while waiting:
        place, above = waiting.pop()
        try:
            status = os.stat(place)
        except OSError as error:
            raise _unlisted(place, error) from None
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise UserError(
                f"{printable(place)} links back to {printable(above[here])}, which contains it; "
                "remove the link"
            )
        folders, files = _listed(place, root)
        yield place, files
        waiting += [(os.path.join(place, name), {**above, here: place}) for name in folders]


def _listed(folder: str, root: Path | None) -> tuple[list[str], list[str]]:
    """Names of the subfolders and of all else, each sorted; a link counts as its target.

    root: links must not lead out of it; None allows it.
    """
    folders, rest = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                # os.path.isdir, because entry.is_dir raises for a link to itself.
                is_link = entry.is_symlink()
                if is_link and root is not None and os.path.exists(entry.path):
                    _check_link(entry.path, root)
                if os.path.isdir(entry.path) if is_link else entry.is_dir():
                    folders.append(entry.name)
                    continue
                # A broken link to an image is skipped like a bad image; others may be folders.
                is_image = entry.name.lower().endswith(EXTENSIONS)
                if is_link and not is_image and not os.path.exists(entry.path):
                    raise UserError(f"{printable(entry.path)} is a broken link; fix or remove it")
                rest.append(entry.name)
    except OSError as error:
        raise _unlisted(folder, error) from None
    return sorted(folders), sorted(rest)


def _unlisted(folder: str, error: OSError) -> UserError:
    way_out = "make it readable or remove it"
    return UserError(f"{printable(folder)} cannot be listed: {error.strerror}; {way_out}")


def _check_link(link: str, root: Path) -> None:
    try:
        contained(root, os.path.relpath(link, root))
    except UserError:
        raise UserError(
            f"{printable(link)} is a link that leads out of {printable(str(root))}, to "
            f"{printable(os.path.realpath(link))}; if you made the links yourself, give "
            "--follow-links"
        ) from None
