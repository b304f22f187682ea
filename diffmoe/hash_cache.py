"""SHA-256 of large files, computed once per machine and cached.

The cache is in $XDG_CACHE_HOME/diffmoe (default ~/.cache/diffmoe) and may be deleted at any time.
Its key is host and path; an entry is valid as long as the file's size and times stay the same.
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

# Files of fewer bytes are not cached.
_SMALL = 1 << 20


def cached_sha256(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal, from the cache if the file has not changed.

    Of several processes that ask for the same file at once, one reads it and the others wait. If
    the cache cannot be written, the file is read each time. Raises OSError if it cannot be read.
    """
    path = Path(path)
    if path.stat().st_size < _SMALL:
        return sha256_of(path)
    with _entry(path) as entry:
        if entry is None:
            return sha256_of(path)
        # ctime, too: a copied file may keep the old time of modification.
        found = path.stat()
        state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        try:
            known = json.loads(entry.read())
            if known["state"] == state:
                return str(known["sha256"])
        except (
            ValueError,
            TypeError,
            KeyError,
        ):  # new, or a write was interrupted
            pass
        digest = sha256_of(path)
        text = json.dumps({"path": str(path.resolve()), "state": state, "sha256": digest})
        with contextlib.suppress(OSError):  # a full disk
            entry.truncate(0)
            entry.write(text.encode())
        return digest


@contextlib.contextmanager
def _entry(path: Path) -> Iterator[BinaryIO | None]:
    """The file's cache entry, open and locked; None if the cache cannot be written."""
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
        except (OSError, RuntimeError):  # RuntimeError: no home directory
            entry = None
        yield entry
