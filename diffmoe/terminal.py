"""A run outlives its terminal, its pipe and the disk of its log: what cannot be told is dropped.

Otherwise the line that tells of a save could keep the save from being made.
"""

import io
import sys


class _Dropping(io.FileIO):
    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError:  # closed at the other end, hung up, or no space left
            return memoryview(data).nbytes


def outlive_terminal() -> None:
    """From now on writing to standard output and error does not fail."""
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        old.flush()
        raw = _Dropping(old.fileno(), "w", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw), encoding=old.encoding, errors=old.errors, line_buffering=True
        )
        setattr(sys, name, stream)
