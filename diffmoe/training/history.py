"""Files of lines that a run adds to: what lies beyond the clock it goes on from is done again."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from diffmoe.errors import UserError
from diffmoe.files import open_regular


def keep(file: Path, wanted: Callable[[Any], bool]) -> None:
    """Drop the lines whose value is not wanted, and those that are no JSON, as a kill tears them.

    Raises UserError for a file that cannot be read or written.
    """
    try:
        content = _content(file)
        kept = b"".join(line + b"\n" for line, value in _parsed(content) if wanted(value))
        if kept != content:
            temporary = file.with_name(f".{file.name}.tmp")
            temporary.write_bytes(kept)
            temporary.replace(file)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"{file} cannot be read or replaced: {error.strerror}; move it away"
        ) from None


def entries(file: Path) -> Iterator[Any]:
    """The values that a file holds, without what is no JSON; none where there is no file."""
    try:
        content = _content(file)
    except OSError:
        return
    for _, value in _parsed(content):
        yield value


def _content(file: Path) -> bytes:
    with open_regular(file) as opened:
        return opened.read()


def _parsed(content: bytes) -> Iterator[tuple[bytes, Any]]:
    for line in content.split(b"\n"):
        try:
            yield line, json.loads(line)
        except (ValueError, RecursionError):
            continue
