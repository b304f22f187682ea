"""Arrays of an npz file by rows: ADM's 50,000 images are 10 GB, and np.load reads all at once."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffmoe.errors import UserError
from diffmoe.files import replacing


def npz_header(file: Path, name: str) -> tuple[int, ...] | None:
    """The shape of an array, None where the file has none of this name."""
    try:
        with zipfile.ZipFile(file) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            with archive.open(f"{name}.npy") as stream:
                return _header(stream)[0]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} is no readable npz file ({error})") from None


def npz_rows(file: Path, name: str, step: int = 1000) -> Iterator[np.ndarray]:
    """An array's rows, at most `step` at a time. Raises UserError where they cannot be read so."""
    with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as stream:
        shape, fortran, dtype = _header(stream)
        if fortran or dtype.hasobject:
            raise UserError(f"{file}: {name} is not a plain array in C order; write it by np.savez")
        size = int(np.prod(shape[1:])) * dtype.itemsize
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            try:
                raw = stream.read(rows * size)
            except (EOFError, zipfile.BadZipFile) as error:
                raise UserError(f"{file}: {name} is damaged ({error}); copy it again") from None
            if len(raw) != rows * size:
                raise UserError(f"{file}: {name} is cut short; copy it again")
            yield np.frombuffer(raw, dtype).reshape(rows, *shape[1:])


def _header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    if np.lib.format.read_magic(stream) == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    return np.lib.format.read_array_header_2_0(stream)


def write_npz(file: Path, arrays: dict[str, np.ndarray]) -> None:
    """Arrays by name, uncompressed: whole or not at all, and on the disk."""
    with replacing(file) as stream:
        np.savez(stream, **arrays)
