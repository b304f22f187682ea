"""Images to read: class folders or tar shards in, square RGB arrays out.

Only regular files are opened: a fifo or a device by the name of an image is a bad image.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffmoe.data.captions import caption_lines
from diffmoe.data.tar_index import Entry, Member, read_member, tar_entries
from diffmoe.errors import UserError
from diffmoe.files import contained, open_regular, read_bytes
from diffmoe.prepare.decoding import WHITE, Color, decoded
from diffmoe.redaction import printable

# Those of torchvision's ImageFolder, and .gif.
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
# Read whole before they are decoded; what is larger is refused unread.
_MOST_BYTES = 512 << 20
_MOST_TEXT = 1 << 20


class ImageItem(NamedTuple):
    """One image: a file, or a member of a tar."""

    name: str  # within the folder of all images, as `printable`
    path: str
    label: int
    key: str
    member: Member | None = None
    txt: Member | None = None  # of a tar


def find_images(
    root: str | Path, captioned: bool = False, follow_links: bool = False
) -> tuple[list[ImageItem], list[str] | None]:
    """All images of a folder, and the names of its classes (None for tars, which have numbers).

    root: class folders (names sorted, as torchvision's ImageFolder does it; subfolders count), or
        uncompressed tars of KEY.jpg (or .png, ...) with KEY.cls.
    captioned: of images with captions, which need no classes (all have label 0, None is given):
        NAME.txt beside NAME.jpg at any depth, or KEY.txt in the tars.
    follow_links: see `image_files`.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"--images {root} is no folder; give one of class folders or of tar shards")
    out = None if follow_links else root
    classes, files = _listed(str(root), out)
    tars = [name for name in files if name.endswith(".tar")]
    if captioned and not tars:
        return _numbered([_of_file(root, file, 0) for file in _images_below(root, out)]), None
    if bool(classes) == bool(tars):
        found = f"{len(classes)} subfolders and {len(tars)} .tar files"
        raise UserError(f"--images {root} holds {found}; it must hold the one or the other")
    items: list[ImageItem] = []
    for tar in tars:
        items += _images_of_tar(root, tar, captioned)
    for label, name in enumerate(classes):
        inside = _images_below(root / name, out)
        if not inside:
            raise UserError(
                f"class folder {printable(str(root / name))} holds no image "
                f"({' '.join(EXTENSIONS)}); put some there, or remove it: every folder counts as "
                "a class"
            )
        items += [_of_file(root, file, label) for file in inside]
    names = None if captioned else [printable(name) for name in classes] or None
    return _numbered(items), names


def image_files(folder: str | Path, follow_links: bool = False) -> list[str]:
    """The images below a folder, in ImageFolder's order: folder by folder, names sorted.

    follow_links: those that lead out of the folder are followed, too, instead of being refused.
    Raises UserError for a folder that cannot be listed, a link to nowhere, and a loop of links.
    """
    return _images_below(folder, None if follow_links else Path(folder))


def read_image(
    path: str | Path, member: Member | None = None, background: Color = WHITE
) -> Image.Image:
    """A file, or a member of a tar, as RGB. Raises OSError or ValueError for a bad image."""
    data = read_bytes(path, _MOST_BYTES) if member is None else member_bytes(path, member)
    return decoded(data, background)


def load_image(item: ImageItem, size: int, background: Color = WHITE) -> np.ndarray:
    """Read, decode, crop: uint8 (size,size,3). Raises OSError or ValueError for a bad image."""
    image = read_image(item.path, item.member, background)
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"{image.width}x{image.height} pixels: too narrow for a square")
    return center_crop(image, size)


def load_captions(item: ImageItem) -> list[str]:
    """The captions of an image. Raises OSError or ValueError where there are none."""
    if item.member is None:
        return caption_lines(read_bytes(Path(item.path).with_suffix(".txt"), _MOST_TEXT))
    if item.txt is None:
        raise ValueError("no txt with captions")
    return caption_lines(member_bytes(item.path, item.txt, _MOST_TEXT))


def center_crop(image: Image.Image, size: int) -> np.ndarray:
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
        with open_regular(path) as stream:
            file = stream.fileno()
            entries = tar_entries(file)
            labels = [
                _bytes_of(file, entry.members["cls"], _MOST_TEXT)
                if "cls" in entry.members
                else None
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
        raise UserError(
            f"{where}.cls holds no class number but {text and text[:20]!r}; mend the tar"
        ) from None


def member_bytes(path: str | Path, member: Member, most: int = _MOST_BYTES) -> bytes:
    """Read one member of a tar. Raises ValueError if it is larger than `most` bytes."""
    with open_regular(path) as stream:
        return _bytes_of(stream.fileno(), member, most)


def _bytes_of(file: int, member: Member, most: int) -> bytes:
    if member.size > most:
        raise ValueError(f"{member.size:,} bytes are too many, at most {most:,} are read")
    return read_member(file, member)


def _numbered(items: list[ImageItem]) -> list[ImageItem]:
    # Keys are numbers, because names may hold dots and spaces, which keys may not.
    return [item._replace(key=f"{number:08d}") for number, item in enumerate(items)]


def _of_file(root: Path, file: str, label: int) -> ImageItem:
    return ImageItem(printable(os.path.relpath(file, root)), file, label, "")


def _images_of_tar(root: Path, tar: str, captioned: bool) -> list[ImageItem]:
    items = []
    for entry, text in zip(*index_tar(root / tar), strict=True):
        name = printable(f"{tar}/{entry.key}")
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


def _images_below(folder: str | Path, root: Path | None) -> list[str]:
    return [
        os.path.join(place, file)
        for place, files in sorted(_folders(str(folder), root))
        for file in files
        if file.lower().endswith(EXTENSIONS)
    ]


def _folders(folder: str, root: Path | None) -> Iterator[tuple[str, list[str]]]:
    """The folder and all below it, with the names of their files, in no order."""
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
                f"{printable(place)} leads back to {printable(above[here])}, which holds it; "
                "remove the link"
            )
        folders, files = _listed(place, root)
        yield place, files
        waiting += [(os.path.join(place, name), {**above, here: place}) for name in folders]


def _listed(folder: str, root: Path | None) -> tuple[list[str], list[str]]:
    """The names of the folders in it and of the rest, sorted; a link is what it leads to.

    root: links may not lead out of it.
    """
    folders, rest = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                # isdir, since is_dir raises for a link that leads to itself.
                is_link = entry.is_symlink()
                if is_link and root is not None and os.path.exists(entry.path):
                    _check_link(entry.path, root)
                if os.path.isdir(entry.path) if is_link else entry.is_dir():
                    folders.append(entry.name)
                    continue
                # A dangling image is skipped like other bad ones; anything else may be a folder.
                is_image = entry.name.lower().endswith(EXTENSIONS)
                if is_link and not is_image and not os.path.exists(entry.path):
                    raise UserError(
                        f"{printable(entry.path)} is a link that leads nowhere; mend or remove it"
                    )
                rest.append(entry.name)
    except OSError as error:
        raise _unlisted(folder, error) from None
    return sorted(folders), sorted(rest)


def _unlisted(folder: str, error: OSError) -> UserError:
    way_out = "let yourself read it, or remove it"
    return UserError(f"{printable(folder)} cannot be listed: {error.strerror}; {way_out}")


def _check_link(link: str, root: Path) -> None:
    try:
        contained(root, os.path.relpath(link, root))
    except UserError:
        raise UserError(
            f"{printable(link)} is a link that leads out of {printable(str(root))}, to "
            f"{printable(os.path.realpath(link))}; if the links are of your own making, give "
            "--follow-links"
        ) from None
