"""Whether torchrun or deepspeed started this process, and whether it is still alive.

A launcher that gets a signal it does not handle dies without stopping its ranks, and `deepspeed`
forwards no signals. The ranks have to notice by themselves and stop, because nobody would stop or
restart them. A shell, nohup, tmux or srun does not count: a run outlives the shell it began in.
"""

import os
import time
from pathlib import Path

import psutil

_NAMES = ("torchrun", "torch.distributed.run", "deepspeed", "ds", "deepspeed.launcher.launch")

# Name and process of each; None before `find_launchers`.
_launchers: list[tuple[str, psutil.Process]] | None = None
_store_lost = False


def find_launchers() -> list[tuple[str, psutil.Process]]:
    """The launchers among this process's ancestors. Call it early, while they are alive."""
    global _launchers
    if _launchers is None:
        _launchers = []
        for process in psutil.Process().parents():
            name = _launcher_name(process)
            if name is not None:
                _launchers.append((f"{name} (process {process.pid})", process))
    return _launchers


def gone() -> str | None:
    """Name and process of a launcher that has ended; None if all are alive or there was none."""
    for name, process in find_launchers():
        if not _alive(process):
            return name
    return "torchrun, which held the ranks' store," if _store_lost else None


def holds_the_store() -> bool:
    """Whether the ranks' rendezvous store runs in torchrun instead of in rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def lost_store() -> bool:
    """For a store that no longer answers: whether a launcher's end is the cause, not rank 0's.

    Waits up to 2 s for the launcher to be seen as gone: a process that ends closes its connections
    first.
    """
    global _store_lost
    deadline = time.monotonic() + 2
    while gone() is None and time.monotonic() < deadline:
        if holds_the_store():  # torchrun may have run on another machine
            _store_lost = True
        time.sleep(0.1)
    return gone() is not None


def _launcher_name(process: psutil.Process) -> str | None:
    """The name of the script or module that a Python process runs, if it is a launcher's."""
    try:
        program, *arguments = process.cmdline() or [""]
    except psutil.Error:
        return None
    if not Path(program).name.startswith("python"):
        return None
    name = Path(next((one for one in arguments if not one.startswith("-")), "")).name
    return name if name in _NAMES else None


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
