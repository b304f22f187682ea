"""Arrays in npy and npz files, read whole, or by rows (50,000 images are 10 GB).

np.load trusts the sizes in a file's headers; these readers first check them against its bytes.
"""

import ast
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import IO, BinaryIO, Literal, NamedTuple

import numpy as np

from diffmoe.errors import UserError
from diffmoe.files import check_unpacked, open_regular, replacing

_GROWTH = 20  # largest ratio of unpacked to packed size; images and statistics are far below
_PART = 256 << 20  # bytes of rows read at a time, and limit of one row
_HEADER = 10_000  # limit of a header in bytes, as numpy's
# What damaged zip and npy files raise; RuntimeError: encryption or an unknown compression method.
_DAMAGE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


class _Header(NamedTuple):
    """Of an npy file. order: C or F. elements: how many."""

    dtype: np.dtype
    shape: tuple[int, ...]
    order: Literal["C", "F"]
    elements: int


def read_npz(file: Path, *names: str) -> dict[str, np.ndarray]:
    """Arrays by name, read-only: those of `names` that exist, or all if no name is given.

    Raises UserError for a file that is not npz, is damaged, or unpacks to many times its size.
    """
    found = {}
    try:
        with open_regular(file) as stream, _opened(stream) as archive:
            for entry in archive.namelist():
                name = entry.removesuffix(".npy")
                if not names or name in names:
                    found[name] = decode_npy(archive.read(entry))
    except _DAMAGE as error:
        raise UserError(f"{file} is not a readable npz file ({error}); copy it again") from None
    return found


def npz_shape(file: Path, name: str) -> tuple[int, ...] | None:
    """The shape of an array; None if the file has none of this name."""
    try:
        with open_regular(file) as stream, _opened(stream) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            with archive.open(f"{name}.npy") as member:
                return _header(member, archive.getinfo(f"{name}.npy").file_size).shape
    except _DAMAGE as error:
        raise UserError(f"{file} is not a readable npz file ({error})") from None


def npz_rows(file: Path, name: str, step: int = 1000) -> Iterator[np.ndarray]:
    """An array's rows, at most `step` at a time. Raises UserError if they cannot be read."""
    try:
        with (
            open_regular(file) as stream,
            _opened(stream) as archive,
            archive.open(f"{name}.npy") as member,
        ):
            yield from _rows(member, archive.getinfo(f"{name}.npy").file_size, step)
    except _DAMAGE as error:
        raise UserError(f"{file}: {name} is damaged ({error}); copy it again") from None


def _rows(member: IO[bytes], size: int, step: int) -> Iterator[np.ndarray]:
    dtype, shape, order, _ = _header(member, size)
    if order == "F" or not shape:
        raise ValueError("it is not a plain array in C order; write it with np.savez")
    row = math.prod(shape[1:]) * dtype.itemsize
    if row > _PART:
        raise ValueError(f"a row of shape {shape[1:]} has {row:,} bytes")
    step = max(1, min(step, _PART // max(1, row)))
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        raw = member.read(rows * row)
        if len(raw) != rows * row or not row:
            raise ValueError("it is cut short")
        yield np.frombuffer(raw, dtype).reshape(rows, *shape[1:])


def write_npz(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Atomically write arrays by name, uncompressed and fsynced."""
    with replacing(file) as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]  # its stubs take names for options


def decode_npy(raw: bytes) -> np.ndarray:
    """The array in the bytes of an npy file, read-only, as np.load returns it.

    Faster than np.load, which spends most of its time on parsing the header: parsed headers are
    cached, and all samples of a shard have the same one. Raises ValueError.
    """
    wide, length = _lengths(raw)
    start = wide + length
    dtype, shape, order, _ = parsed = _parsed(raw[wide:start])
    _check_size(len(raw), start, parsed)
    return np.frombuffer(raw, dtype, offset=start).reshape(shape, order=order)


def _header(member: IO[bytes], size: int) -> _Header:
    """The header of an npy file of `size` bytes, which it must fit."""
    begin = member.read(12)
    wide, length = _lengths(begin)
    parsed = _parsed((begin + member.read(wide + length - 12))[wide:])
    _check_size(size, wide + length, parsed)
    return parsed


def _check_size(size: int, start: int, header: _Header) -> None:
    expected = start + header.elements * header.dtype.itemsize
    if size != expected:
        raise ValueError(f"{size} bytes instead of {expected}")


def _lengths(raw: bytes) -> tuple[int, int]:
    """Offset and length of an npy header."""
    if raw[:6] != b"\x93NUMPY" or len(raw) < 12:
        raise ValueError("not an npy file")
    wide = raw[6] > 1  # version 1.0 has a length of 2 bytes, later ones of 4
    (length,) = struct.unpack_from("<I" if wide else "<H", raw, 8)
    if length > _HEADER:
        raise ValueError(f"an npy header of {length:,} bytes")
    return 12 if wide else 10, length


@lru_cache(maxsize=64)
def _parsed(header: bytes) -> _Header:
    try:
        fields = ast.literal_eval(header.decode("latin1"))
        dtype, shape = np.dtype(fields["descr"]), tuple(map(int, fields["shape"]))
        order: Literal["C", "F"] = "F" if fields.get("fortran_order") else "C"
    # Deep nesting makes the parser raise MemoryError or RecursionError.
    except Exception as error:
        raise ValueError(f"a broken npy header: {type(error).__name__}: {error}") from None
    if dtype.hasobject:
        raise ValueError("it holds Python objects, not numbers")
    if min(shape, default=0) < 0 or len(shape) > 32 or not dtype.itemsize:
        raise ValueError(f"an array of shape {shape} and type {dtype}")
    return _Header(dtype, shape, order, math.prod(shape))


def _opened(stream: BinaryIO) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(stream)
    size = stream.seek(0, 2)
    check_unpacked(archive, size, _GROWTH)
    return archive
