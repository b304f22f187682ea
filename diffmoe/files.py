"""Files written whole or not at all, their checksums, and reading that nothing can make endless.

A file that somebody else made may be a pipe that never ends, a link to somewhere else, or larger
than this machine: what is opened here is a regular file, and is read up to a limit.
"""

import contextlib
import errno
import hashlib
import json
import os
import socket
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from diffmoe.errors import UserError

# Of text and JSON, in bytes. Parsed, JSON takes up to 24 times as much memory.
TEXT_LIMIT = 32 << 20
HEADER_LIMIT = 16 << 20  # of safetensors, some 100 bytes a tensor
_LINE_LIMIT = 1 << 20  # of one line of a file of lines
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


# Reading


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError for anything else, without waiting for it."""
    _refuse_special(os.stat(path).st_mode, path)  # to open some devices is to change them
    # Without O_NONBLOCK a pipe that took the file's place meanwhile would hold us up.
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = open(number, "rb")  # noqa: SIM115 (returned open)
    try:
        _refuse_special(os.fstat(number).st_mode, path)
    except OSError:
        file.close()
        raise
    return file


def refuse_special(path: str | Path) -> None:
    """For files that a library opens by itself. Raises OSError for what is no regular file."""
    _refuse_special(os.stat(path).st_mode, path)


def read_bytes(path: str | Path, limit: int = TEXT_LIMIT) -> bytes:
    """All of a regular file. Raises OSError for anything else and for what is over the limit."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if size <= limit else b""
    if max(size, len(data)) > limit:
        told = f"{size:,} bytes are too many, at most {limit:,} are read"
        raise OSError(errno.EFBIG, told, str(path))
    return data


def read_text(path: str | Path, limit: int = TEXT_LIMIT, encoding: str = "utf-8") -> str:
    """The same, decoded. Raises UnicodeDecodeError, too."""
    return read_bytes(path, limit).decode(encoding)


def read_json(file: str | Path, limit: int = TEXT_LIMIT) -> Any:
    """A JSON file. Raises UserError if it cannot be read or is none."""
    try:
        return json.loads(read_text(file, limit))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error})") from None


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a file of any length, without their ends. Raises OSError, UnicodeDecodeError."""
    with open_regular(path) as file:
        while line := file.readline(_LINE_LIMIT + 1):
            if len(line) > _LINE_LIMIT:
                told = f"a line has more than {_LINE_LIMIT:,} bytes"
                raise OSError(errno.EFBIG, told, str(path))
            yield line.decode("utf-8").rstrip("\r\n")


def check_unpacked(archive: zipfile.ZipFile, size: int, growth: int = 1) -> None:
    """Raises ValueError where a zip of `size` bytes would unpack to over `growth` times as many."""
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > growth * size:
        raise ValueError(f"its {size:,} bytes would unpack to {unpacked:,}")


def check_safetensors(path: Path) -> None:
    """Raises OSError for no regular file, ValueError for a header larger than any model's."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > HEADER_LIMIT:
        raise ValueError(f"its header has {length:,} bytes, at most {HEADER_LIMIT:,} are read")


def contained(folder: Path, name: str) -> Path:
    """folder/name. Raises UserError where that leads out of the folder, by its name or by a link.

    The links of a Hugging Face cache, snapshots/REVISION/FILE to blobs/HASH, are no way out.
    """
    path = folder / name
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(home) for home in _homes(folder)):
        raise UserError(
            f"{path} leads out of its folder, to {real}; put a copy of the file there if it is "
            "meant to be"
        )
    return path


def check_tree(folder: Path, way_out: str) -> None:
    """Raises UserError for a link that leads out of a folder, for a loop, and for special files.

    Out is what `contained` takes for it. way_out: for links, beside a copy of what they lead to.
    """
    homes = _homes(folder)
    places = [str(folder)]
    try:
        while places:
            place = places.pop()
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.is_symlink():
                        try:
                            os.stat(entry.path)
                        except FileNotFoundError:
                            continue  # a link to nothing: whoever opens it will tell
                        _check_link(entry.path, place, homes, way_out)
                    if entry.is_dir():
                        places.append(entry.path)
                    elif not entry.is_file():
                        kind = _kind(entry.stat().st_mode)
                        raise UserError(f"{entry.path} is {kind}, no regular file; remove it")
    except OSError as error:  # a loop of links, a folder that may not be read
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None


def _homes(folder: Path) -> list[Path]:
    """Where what belongs to a folder lies: in itself; of a Hugging Face cache also in its blobs."""
    root = Path(os.path.realpath(folder))
    caches = [p.parent.parent for p in (root, *root.parents) if p.parent.name == "snapshots"]
    return [root, *(cache / "blobs" for cache in caches)]


def _check_link(link: str, place: str, homes: list[Path], way_out: str) -> None:
    target = Path(os.path.realpath(link))
    if not any(target.is_relative_to(home) for home in homes):
        raise UserError(
            f"{link} is a link that leads out of {homes[0]}, to {target}; put a copy there{way_out}"
        )
    if Path(os.path.realpath(place)).is_relative_to(target):
        raise UserError(f"{link} is a link to a folder that it lies in, {target}; remove it")


def _refuse_special(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {_kind(mode)}, no regular file", str(path))


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")


# Checksums


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError for what is no regular file."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Writing


@contextlib.contextmanager
def replacing(file: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """A stream whose bytes take the place of `file` when the block ends well: all or none of them.

    temporary: written until then; by default a name of this process alone.
    """
    temporary = temporary or temporary_name(file)
    with open(temporary, "wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def write_atomically(file: Path, text: str) -> None:
    """Replace a file as a whole, on the disk before it gets its name. For one writer at a time."""
    with replacing(file, file.with_name(f".{file.name}.tmp")) as stream:
        stream.write(text.encode())
    sync(file.parent)


def write_json(file: Path, value: Any) -> None:
    """Whole or not at all, and on the disk; any number of processes may write the same file."""
    with replacing(file) as stream:
        stream.write(json.dumps(value).encode())


def temporary_name(file: Path) -> Path:
    """Where this process writes a file until it is whole."""
    return file.with_name(f"{file.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def sync(path: Path) -> None:
    """A file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
