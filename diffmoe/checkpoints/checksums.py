"""checksums.json of a checkpoint: size and SHA-256 of every other file, written last.

A folder without it is not a checkpoint; one whose files do not match it is damaged.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

from diffmoe.checkpoints import run_file
from diffmoe.errors import UserError
from diffmoe.files import open_regular, read_bytes, sha256_of, write_atomically

FILE_NAME = "checksums.json"


class Entry(TypedDict):
    """Of one file; sha256 in hexadecimal."""

    bytes: int
    sha256: str


Checksums = dict[str, Entry]  # by file name


def read_checksums(checkpoint: Path) -> Checksums:
    """Raises UserError where the file is missing, cannot be read, or is damaged."""
    file = checkpoint / FILE_NAME
    try:
        listed = json.loads(read_bytes(file))["files"]
        for name, entry in listed.items():
            os.fsencode(name)  # raises for what cannot be a file name
            if name != Path(name).name or "\0" in name:
                raise ValueError(f"{name!r} is not the name of a file in this folder")
            if type(entry["bytes"]) is not int or type(entry["sha256"]) is not str:
                raise ValueError(f"size and SHA-256 of {name}")
        listed[run_file.FILE_NAME]
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{checkpoint} is not complete: it has no {FILE_NAME}") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error})") from None
    return listed


def write_checksums(folder: Path, files: Checksums) -> None:
    write_atomically(folder / FILE_NAME, json.dumps({"files": files}, indent=1))


def wrong_sizes(checkpoint: Path, part: int = 0, parts: int = 1) -> list[str]:
    """Problems with files that checksums.json lists: missing, of another size, or not readable.

    part, parts: check only every `parts`-th file, so that the ranks can share the work.
    """
    try:
        listed = read_checksums(checkpoint)
    except UserError as error:
        return [str(error)]
    problems = []
    for name, entry in sorted(listed.items())[part::parts]:
        file = checkpoint / name
        try:
            with open_regular(file) as opened:
                size = os.fstat(opened.fileno()).st_size
        except (FileNotFoundError, NotADirectoryError):
            problems.append(f"{file} is missing")
        except OSError as error:
            problems.append(f"{file} cannot be read: {error.strerror}")
        else:
            if size != entry["bytes"]:
                problems.append(f"{file} has {size} bytes, not {entry['bytes']}")
    return problems


def find_damage(
    checkpoint: str | Path,
    part: int = 0,
    parts: int = 1,
    digest: Callable[[Path], str] = sha256_of,
) -> list[str]:
    """Problems of a checkpoint: sizes, and if these are right SHA-256. Empty if it is intact.

    part, parts: as in `wrong_sizes`. digest: gives a file's SHA-256; the default reads the file.
    """
    checkpoint = Path(checkpoint)
    problems = wrong_sizes(checkpoint, part, parts)
    if problems:
        return problems
    for name, entry in sorted(read_checksums(checkpoint).items())[part::parts]:
        try:
            found = digest(checkpoint / name)
        except OSError as error:
            problems.append(f"{checkpoint / name} cannot be read: {error.strerror}")
            continue
        if found != entry["sha256"]:
            problems.append(f"{checkpoint / name} is damaged: its SHA-256 is not that of the save")
    return problems
