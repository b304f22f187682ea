"""Output that never fails: a run survives the end of its terminal or pipe, and a full log disk.

Otherwise a failed print about a save could prevent the save itself.
"""

import io
import sys
from typing import Any


class _LossyFile(io.FileIO):
    """Drops what cannot be written."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:  # closed at the other end, hung up, or no space left
            return memoryview(data).nbytes


def ignore_output_errors() -> None:
    """Replace stdout and stderr by streams whose writes do not fail."""
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        old.flush()
        raw = _LossyFile(old.fileno(), "w", closefd=False)
        stream = io.TextIOWrapper(
            io.BufferedWriter(raw), encoding=old.encoding, errors=old.errors, line_buffering=True
        )
        setattr(sys, name, stream)
