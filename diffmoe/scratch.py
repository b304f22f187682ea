"""This process's temporary files, torch's and wandb's too, in one folder that goes with it."""

import atexit
import getpass
import os
import shutil
import sys
import tempfile
from typing import NoReturn

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
    atexit.register(leave)


def leave() -> None:
    if _folder is not None and os.getpid() == _owner:
        shutil.rmtree(_folder, ignore_errors=True)


def exit_now(code: int) -> NoReturn:
    """End this process without waiting for threads or for what was to run at its end."""
    leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
