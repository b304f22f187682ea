"""Atomic writes, checksums, and safe reading of files that somebody else made.

Such a file may be a pipe that never ends, a link to somewhere else, or larger than this machine's
memory: the functions here open only regular files, and read up to a limit.
"""

import contextlib
import difflib
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

# Bytes of text or JSON. Parsed JSON takes up to 24 times as much memory.
TEXT_LIMIT = 32 << 20
HEADER_LIMIT = 16 << 20  # bytes of a safetensors header, about 100 per tensor
_LINE_LIMIT = 1 << 20  # bytes of one line
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


# Reading


def open_regular(path: str | Path) -> BinaryIO:
    """Open a regular file for reading. Raises OSError for anything else, without blocking."""
    _refuse_special(os.stat(path).st_mode, path)  # merely opening some devices has effects
    # O_NONBLOCK: if a pipe has replaced the file meanwhile, opening it must not block.
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    file = open(number, "rb")  # noqa: SIM115 (returned open)
    try:
        _refuse_special(os.fstat(number).st_mode, path)
    except OSError:
        file.close()
        raise
    return file


def refuse_special(path: str | Path) -> None:
    """Raise OSError for anything but a regular file. For files that a library opens itself."""
    _refuse_special(os.stat(path).st_mode, path)


def read_bytes(path: str | Path, limit: int = TEXT_LIMIT) -> bytes:
    """The content of a regular file. Raises OSError for anything else, and above the limit."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit + 1) if size <= limit else b""
    if max(size, len(data)) > limit:
        reason = f"{size:,} bytes are too many, at most {limit:,} are read"
        raise OSError(errno.EFBIG, reason, str(path))
    return data


def read_text(path: str | Path, limit: int = TEXT_LIMIT, encoding: str = "utf-8") -> str:
    """As `read_bytes`, decoded. Raises UnicodeDecodeError, too."""
    return read_bytes(path, limit).decode(encoding)


def read_json(file: str | Path, limit: int = TEXT_LIMIT) -> Any:
    """The value in a JSON file. Raises UserError if it cannot be read or is not JSON."""
    try:
        return json.loads(read_text(file, limit))
    except OSError as error:
        raise UserError(cannot_read(file, error)) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error})") from None


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a UTF-8 file, without line ends, one at a time.

    Raises OSError (also for a line of over 1 MiB) and UnicodeDecodeError.
    """
    with open_regular(path) as file:
        while line := file.readline(_LINE_LIMIT + 1):
            if len(line) > _LINE_LIMIT:
                reason = f"a line has more than {_LINE_LIMIT:,} bytes"
                raise OSError(errno.EFBIG, reason, str(path))
            yield line.decode("utf-8").rstrip("\r\n")


def check_unpacked(archive: zipfile.ZipFile, size: int, growth: int = 1) -> None:
    """Raise ValueError if a zip file of `size` bytes unpacks to over `growth` times as many."""
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > growth * size:
        raise ValueError(f"its {size:,} bytes would unpack to {unpacked:,}")


def check_safetensors(path: Path) -> None:
    """Raise OSError if it is not a regular file, ValueError if its header is unreasonably large."""
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > HEADER_LIMIT:
        raise ValueError(f"its header has {length:,} bytes, at most {HEADER_LIMIT:,} are read")


def contained(folder: Path, name: str) -> Path:
    """folder/name. Raises UserError if that is outside of the folder, by its name or by a link.

    Links inside a Hugging Face cache, from snapshots/REVISION/FILE to blobs/HASH, are allowed.
    """
    path = folder / name
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(home) for home in _homes(folder)):
        raise UserError(
            f"{path} leads out of its folder, to {real}; if that is intended, put a copy of the "
            "file there"
        )
    return path


def check_tree(folder: Path, way_out: str) -> None:
    """Raise UserError for special files below a folder, for link loops, and for links out of it.

    Links inside a Hugging Face cache are allowed, as in `contained`. way_out: end of the message
    about a link, what else to do than putting a copy there.
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
                            continue  # a dangling link: whoever opens it reports that
                        _check_link(entry.path, place, homes, way_out)
                    if entry.is_dir():
                        places.append(entry.path)
                    elif not entry.is_file():
                        kind = _kind(entry.stat().st_mode)
                        raise UserError(f"{entry.path} is {kind}, not a regular file; remove it")
    except OSError as error:  # a loop of links, or no permission
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None


def _homes(folder: Path) -> list[Path]:
    """Where a folder's files may be: in itself, and in the blobs of a Hugging Face cache."""
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
        raise UserError(f"{link} is a link to a folder that contains it, {target}; remove it")


def _refuse_special(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {_kind(mode)}, not a regular file", str(path))


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "something else")


# Checksums


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError if it is not a regular file."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Writing


@contextlib.contextmanager
def replacing(file: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """A stream whose bytes replace `file` when the block ends without an exception: all or none.

    temporary: the file written until then; default a name unique to this process.
    """
    temporary = temporary or temporary_name(file)
    with open(temporary, "wb") as stream:
        yield stream
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)


def write_atomically(file: Path, text: str) -> None:
    """Replace a file by a text that is on disk before it gets the name. One writer at a time."""
    with replacing(file, file.with_name(f".{file.name}.tmp")) as stream:
        stream.write(text.encode())
    sync(file.parent)


def write_json(file: Path, value: Any) -> None:
    """Atomically write a value as JSON, fsynced. Several processes may write the same file."""
    with replacing(file) as stream:
        stream.write(json.dumps(value).encode())


def temporary_name(file: Path) -> Path:
    """Where this process writes a file until it is complete."""
    return file.with_name(f"{file.name}.{socket.gethostname()}-{os.getpid()}.tmp")


def sync(path: Path) -> None:
    """fsync a file, or a folder (the names in it)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cannot_read(path: str | Path, error: OSError) -> str:
    """Why not; of a file that is not there, with what it may be meant to be."""
    if isinstance(error, FileNotFoundError) and not os.path.lexists(path):
        return does_not_exist(path)
    return f"cannot read {path}: {error.strerror}"


def does_not_exist(path: str | Path) -> str:
    """The error for a path that is not there, with the existing one that is most like it."""
    there = Path(path)
    while not there.parent.is_dir():  # the first part that is wrong
        there = there.parent
    try:
        names = [name for name in os.listdir(there.parent) if name != there.name]
    except OSError:
        names = []
    near = difflib.get_close_matches(there.name, names, 1, cutoff=0.6)
    meant = (
        f" (did you mean {there.parent / near[0] / Path(path).relative_to(there)}?)" if near else ""
    )
    return f"{path} does not exist{meant}"
