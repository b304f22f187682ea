"""What can only be read from its start, rewritten as plain tars while a folder is packed.

A shard's images come from everywhere in the folder, so each must be found at once.
"""

import bz2
import gzip
import hashlib
import lzma
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from diffmoe.errors import UserError
from diffmoe.files import open_regular, replacing, temporary_name
from diffmoe.work import Ranks, ensure_writable, remove_stale_files

_GROWTH, _SMALL = 20, 1 << 30  # a file may unpack to 20 times its size, or to 1 GiB


@dataclass(frozen=True)
class PlainTars:
    """A folder for plain tars, which any number of ranks fill together and resume.

    Each rank begins at another file and skips what the others have finished; none waits.
    """

    folder: Path
    ranks: Ranks = field(default_factory=Ranks)

    def unpacked(self, tars: Sequence[Path]) -> list[Path]:
        """The same tars, with plain ones in place of the compressed. Raises UserError."""
        packed = [tar for tar in tars if tar.name.endswith(COMPRESSED)]
        plain = dict(zip(packed, self.written(packed, unpack), strict=True))
        return [plain.get(tar, tar) for tar in tars]

    def written(
        self, files: Sequence[Path], write: Callable[[Path, BinaryIO], None], settings: str = ""
    ) -> list[Path]:
        """The plain tar of each file, written by `write(file, stream)` where it is missing.

        settings: all else that decides what is written. Raises UserError.
        """
        if not files:
            return []
        ensure_writable(self.folder)
        remove_stale_files(self.folder)
        tars = [self.folder / f"{_identity(file, settings)}.tar" for file in files]
        begin = len(files) * self.ranks.rank // self.ranks.world
        for number in (*range(begin, len(files)), *range(begin)):
            file, tar = files[number], tars[number]
            if tar.exists():
                continue
            try:
                with replacing(tar) as stream:
                    write(file, stream)
            except OSError as error:
                reason = error.strerror or error
                raise UserError(f"{file} cannot be unpacked into {tar}: {reason}") from None
            finally:
                temporary_name(tar).unlink(missing_ok=True)
        return tars

    def remove(self) -> None:
        """Remove them all: the work is done."""
        shutil.rmtree(self.folder, ignore_errors=True)


def unpack(file: Path, stream: BinaryIO) -> None:
    """Write the plain tar in a compressed one. Raises UserError if it is damaged or a bomb."""
    limit = unpacked_limit(file)
    try:
        with open_regular(file) as packed, _OPEN[file.suffix](packed) as source:
            while block := source.read(1 << 20):
                limit -= len(block)
                if limit < 0:
                    raise too_large(file)
                stream.write(block)
    except (ValueError, EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"{file} cannot be unpacked ({error}); copy it again") from None


def unpacked_limit(file: Path) -> int:
    """How many bytes a file may unpack to."""
    return max(_SMALL, _GROWTH * os.path.getsize(file))


def too_large(file: Path) -> UserError:
    """The error for one that unpacks to more."""
    return UserError(
        f"{file}: its {os.path.getsize(file):,} bytes unpack to over {unpacked_limit(file):,}; "
        "remove it"
    )


def pyarrow_for(what: str | Path) -> ModuleType:
    """pyarrow. Raises UserError if it is not installed."""
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f'{what} needs pyarrow, which is not installed; run: pip install "diffmoe[arrow]"'
        ) from None
    return pyarrow


def _zstd(packed: BinaryIO) -> Any:
    pyarrow = pyarrow_for("a .tar.zst")
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, "r"), "zstd")


# By the last part of the name.
_OPEN: dict[str, Callable[..., Any]] = {
    **dict.fromkeys((".gz", ".tgz"), gzip.open),
    **dict.fromkeys((".bz2", ".tbz2"), bz2.open),
    **dict.fromkeys((".xz", ".txz"), lzma.open),
    **dict.fromkeys((".zst", ".tzst"), _zstd),
}
COMPRESSED = tuple(end if end.startswith(".t") else f".tar{end}" for end in _OPEN)


def _identity(file: Path, settings: str) -> str:
    """Another one for another file by the same name."""
    status = file.stat()
    said = f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {settings}"
    return hashlib.sha256(said.encode(errors="surrogateescape")).hexdigest()[:20]
