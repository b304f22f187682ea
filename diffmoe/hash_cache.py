"""SHA-256 of large files, each read once per machine and remembered.

Remembered are host, path, size and times of a file, in $XDG_CACHE_HOME/diffmoe (~/.cache/diffmoe),
which may be deleted at any time.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from diffmoe.files import sha256_of

# Bytes of a file that is not worth an entry.
_SMALL = 1 << 20


def cached_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal; read unless it is known and unchanged since.

    Processes that ask for the same file at once wait for one of them to read it. Where the cache's
    folder cannot be written, files are read each time. Raises OSError where the file cannot be.
    """
    path = Path(path)
    if path.stat().st_size < _SMALL:
        return sha256_of(path)
    with _entry(path) as entry:
        if entry is None:
            return sha256_of(path)
        # The time of change, too: a copy may carry the old time of modification.
        found = path.stat()
        state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        try:
            known = json.loads(entry.read())
            if known["state"] == state:
                return str(known["sha256"])
        except (ValueError, TypeError, KeyError):  # new, or a kill has torn it
            pass
        digest = sha256_of(path)
        text = json.dumps({"path": str(path.resolve()), "state": state, "sha256": digest})
        with contextlib.suppress(OSError):  # a full disk
            entry.truncate(0)
            entry.write(text.encode())
        return digest


@contextlib.contextmanager
def _entry(path: Path) -> Iterator[BinaryIO | None]:
    """The file's entry, locked; None where there can be none."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = json.dumps([socket.gethostname(), str(path.resolve())])
    folder = Path(home) / "diffmoe" / "sha256"
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            name = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
            entry = stack.enter_context(open(folder / name, "a+b", buffering=0))
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(entry, fcntl.LOCK_EX)
            entry.seek(0)
        except (OSError, RuntimeError):  # RuntimeError: no home
            entry = None
        yield entry
