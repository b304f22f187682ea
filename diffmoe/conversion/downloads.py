"""Checksums of downloaded files: what huggingface_hub leaves of those of large files."""

import re
from collections.abc import Iterable
from pathlib import Path

from diffmoe.errors import UserError
from diffmoe.files import sha256_of

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_downloads(folder: Path, names: Iterable[str]) -> None:
    """Hold files of a folder against their hashes, where the download left any.

    Raises UserError naming the first that is damaged.
    """
    for name in names:
        file = folder / name
        expected = _expected(file, folder)
        if expected is not None and (not file.is_file() or sha256_of(file) != expected):
            raise UserError(
                f"{file} is damaged: its SHA-256 is not that of the download; get it again"
            )


def _expected(file: Path, folder: Path) -> str | None:
    """In the cache a file is a link to a blob of that name; in a folder of the user's choice there
    are notes, of which the second line is the hash if the file is a large one.
    """
    blob = file.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    for root in (folder, folder.parent):  # a model alone, or a part of a pipeline
        place = file.relative_to(root)
        notes = root / ".cache" / "huggingface" / "download" / f"{place}.metadata"
        if notes.is_file():
            lines = notes.read_text(errors="replace").splitlines()
            if len(lines) > 1 and _SHA256.fullmatch(lines[1].strip()):
                return lines[1].strip()
    return None
