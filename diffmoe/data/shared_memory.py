"""Whether the batches that workers make fit the memory that processes share.

torch hands tensors over in files of /dev/shm. A container often has 64 MB there, and who writes
beyond it is killed by a bus error.
"""

import os
import shutil
from pathlib import Path

PLACE = Path("/dev/shm")


def free() -> int | None:
    """Bytes; None where the system has no such place."""
    return shutil.disk_usage(PLACE).free if PLACE.is_dir() else None


def holds(size: int) -> bool:
    """Whether every rank of this machine has room for `size` bytes."""
    room = free()
    return room is None or size * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= room
