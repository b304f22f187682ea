"""Arrays in npy and npz files: whole, or by rows where 50,000 images are 10 GB.

np.load trusts the sizes that a file tells; these readers hold them against its bytes first.
"""

import ast
import math
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffmoe.errors import UserError
from diffmoe.files import check_unpacked, open_regular, replacing

_GROWTH = 20  # of packed arrays, unpacked; images and statistics stay far below
_PART = 256 << 20  # bytes of rows that are read at a time, and of one row at most
_HEADER = 10_000  # bytes of a header, as numpy has it
# What damaged zip and npy files end in; RuntimeError is of encrypted ones and unknown methods.
_DAMAGE = (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)


def read_npz(file: Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays of these names, as far as they are there; all if none is given; read-only.

    Raises UserError for what is no npz file, is damaged, or unpacks to many times its size.
    """
    found = {}
    try:
        with open_regular(file) as stream, _opened(stream) as archive:
            for entry in archive.namelist():
                name = entry.removesuffix(".npy")
                if not names or name in names:
                    found[name] = decode_npy(archive.read(entry))
    except _DAMAGE as error:
        raise UserError(f"{file} is no readable npz file ({error}); copy it again") from None
    return found


def npz_header(file: Path, name: str) -> tuple[int, ...] | None:
    """The shape of an array, None where the file has none of this name."""
    try:
        with open_regular(file) as stream, _opened(stream) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            with archive.open(f"{name}.npy") as member:
                return _header(member, archive.getinfo(f"{name}.npy").file_size)[1]
    except _DAMAGE as error:
        raise UserError(f"{file} is no readable npz file ({error})") from None


def npz_rows(file: Path, name: str, step: int = 1000) -> Iterator[np.ndarray]:
    """An array's rows, at most `step` at a time. Raises UserError where they cannot be read so."""
    try:
        with (
            open_regular(file) as stream,
            _opened(stream) as archive,
            archive.open(f"{name}.npy") as member,
        ):
            yield from _rows(member, archive.getinfo(f"{name}.npy").file_size, step)
    except _DAMAGE as error:
        raise UserError(f"{file}: {name} is damaged ({error}); copy it again") from None


def _rows(member: BinaryIO, size: int, step: int) -> Iterator[np.ndarray]:
    dtype, shape, order, _ = _header(member, size)
    if order == "F" or not shape:
        raise ValueError("it is no plain array in C order; write it by np.savez")
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
    """Arrays by name, uncompressed: whole or not at all, and on the disk."""
    with replacing(file) as stream:
        np.savez(stream, **arrays)


def decode_npy(raw: bytes) -> np.ndarray:
    """What np.load gives for the bytes of an npy file; read-only. Raises ValueError.

    np.load spends most of its time on parsing the header, and all headers of a shard are alike.
    """
    wide, length = _lengths(raw)
    start = wide + length
    dtype, shape, order, _ = parsed = _parsed(raw[wide:start])
    _check_size(len(raw), start, parsed)
    return np.frombuffer(raw, dtype, offset=start).reshape(shape, order=order)


def _header(member: BinaryIO, size: int) -> tuple[np.dtype, tuple[int, ...], str, int]:
    """What `_parsed` gives, of a member of so many bytes."""
    begin = member.read(12)
    wide, length = _lengths(begin)
    parsed = _parsed((begin + member.read(wide + length - 12))[wide:])
    _check_size(size, wide + length, parsed)
    return parsed


def _check_size(size: int, start: int, parsed: tuple[np.dtype, tuple[int, ...], str, int]) -> None:
    dtype, _, _, count = parsed
    if size != start + count * dtype.itemsize:
        raise ValueError(f"{size} bytes instead of {start + count * dtype.itemsize}")


def _lengths(raw: bytes) -> tuple[int, int]:
    """Where an npy header begins, and its length."""
    if raw[:6] != b"\x93NUMPY" or len(raw) < 12:
        raise ValueError("no npy file")
    wide = raw[6] > 1  # version 1.0 has a length of 2 bytes, later ones of 4
    (length,) = struct.unpack_from("<I" if wide else "<H", raw, 8)
    if length > _HEADER:
        raise ValueError(f"an npy header of {length:,} bytes")
    return 12 if wide else 10, length


@lru_cache(maxsize=64)
def _parsed(header: bytes) -> tuple[np.dtype, tuple[int, ...], str, int]:
    """Type, shape, order and number of elements that an npy header tells."""
    try:
        fields = ast.literal_eval(header.decode("latin1"))
        dtype, shape = np.dtype(fields["descr"]), tuple(map(int, fields["shape"]))
        order = "F" if fields.get("fortran_order") else "C"
    # Deep nesting ends the parser with MemoryError or RecursionError.
    except Exception as error:
        raise ValueError(f"a broken npy header: {type(error).__name__}: {error}") from None
    if dtype.hasobject:
        raise ValueError("it holds Python objects, not numbers")
    if min(shape, default=0) < 0 or len(shape) > 32 or not dtype.itemsize:
        raise ValueError(f"an array of shape {shape} and type {dtype}")
    return dtype, shape, order, math.prod(shape)


def _opened(stream: BinaryIO) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(stream)
    size = stream.seek(0, 2)
    check_unpacked(archive, size, _GROWTH)
    return archive
