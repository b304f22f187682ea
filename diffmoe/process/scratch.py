"""One folder for all temporary files of this process (torch's and wandb's too), removed at exit."""

import getpass
import os
import shutil
import tempfile

from diffmoe.process.exit import at_exit

_folder: str | None = None
_owner = 0  # forked readers inherit the folder but must not remove it


def use_scratch_folder(keep_compiled: bool) -> None:
    """Create the folder and point TMPDIR and `tempfile` to it.

    keep_compiled: leave torch's compiled kernels in its shared cache, for later runs.
    """
    global _folder, _owner
    shared = tempfile.gettempdir()
    _folder, _owner = tempfile.mkdtemp(prefix="diffmoe-"), os.getpid()
    kernels = shared if keep_compiled else _folder
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{kernels}/torchinductor_{getpass.getuser()}")
    os.environ["TMPDIR"] = tempfile.tempdir = _folder
    at_exit(_remove)


def _remove() -> None:
    if _folder is not None and os.getpid() == _owner:
        shutil.rmtree(_folder, ignore_errors=True)
