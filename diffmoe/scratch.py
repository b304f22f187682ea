"""This process's temporary files, torch's and wandb's too, in one folder that goes with it."""

import getpass
import os
import shutil
import tempfile

from diffmoe.ending import at_any_end

_folder: str | None = None
_owner = 0  # forked readers inherit the name, not the duty


def enter(keep_compiled: bool) -> None:
    """From here on temporary files go to a folder that is removed at the end of the process.

    keep_compiled: torch's compiled kernels stay where torch keeps them for later runs.
    """
    global _folder, _owner
    shared = tempfile.gettempdir()
    _folder, _owner = tempfile.mkdtemp(prefix="diffmoe-"), os.getpid()
    kernels = shared if keep_compiled else _folder
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{kernels}/torchinductor_{getpass.getuser()}")
    os.environ["TMPDIR"] = tempfile.tempdir = _folder
    at_any_end(_remove)


def _remove() -> None:
    if _folder is not None and os.getpid() == _owner:
        shutil.rmtree(_folder, ignore_errors=True)
