"""Verifies downloaded files by the checksums that huggingface_hub keeps of large files."""

import re
from collections.abc import Iterable
from pathlib import Path

from diffmoe.errors import UserError
from diffmoe.files import sha256_of

_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_downloads(folder: Path, names: Iterable[str]) -> None:
    """Compare files of a folder with their SHA-256, where the download left it.

    Raises UserError naming the first file that is damaged.
    """
    for name in names:
        file = folder / name
        expected = _expected(file, folder)
        if expected is not None and (not file.is_file() or sha256_of(file) != expected):
            raise UserError(
                f"{file} is damaged: its SHA-256 is not that of the download; download it again"
            )


def _expected(file: Path, folder: Path) -> str | None:
    """A file's SHA-256, if the download left it.

    In the cache, large files are links to blobs named by their hash. A folder that the user chose
    has metadata files, whose second line is the hash of a large file.
    """
    blob = file.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    for root in (folder, folder.parent):  # a model alone, or a part of a pipeline
        relative = file.relative_to(root)
        notes = root / ".cache" / "huggingface" / "download" / f"{relative}.metadata"
        if notes.is_file():
            lines = notes.read_text(errors="replace").splitlines()
            if len(lines) > 1 and _SHA256.fullmatch(lines[1].strip()):
                return lines[1].strip()
    return None
