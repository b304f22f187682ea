"""torchrun or deepspeed, if one of them started this process: when it has gone, so must its ranks.

A signal that they do not know ends them at once, and `deepspeed` hands none on; nobody would end
the ranks then, or start them again. A shell, nohup, tmux or srun is no launcher: a run outlives the
shell that began it.
"""

import os
import time
from pathlib import Path

import psutil

_NAMES = ("torchrun", "torch.distributed.run", "deepspeed", "ds", "deepspeed.launcher.launch")

# As the process itself, one each.
_launchers: list[tuple[str, psutil.Process]] | None = None
_store_lost = False


def remember() -> None:
    """Look who started this process, before it can have gone."""
    global _launchers
    if _launchers is None:
        _launchers = []
        for process in psutil.Process().parents():
            name = _launcher_name(process)
            if name is not None:
                _launchers.append((f"{name} (process {process.pid})", process))


def gone() -> str | None:
    """The launcher that has gone, with its process; None while all are there, or without any."""
    remember()
    for name, process in _launchers:
        if not _alive(process):
            return name
    return "torchrun, which held the ranks' store," if _store_lost else None


def holds_the_store() -> bool:
    """Whether the store in which the ranks meet is torchrun's and not rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def lost_store() -> bool:
    """The store gives no answer any more: whether that is a launcher's end, and not rank 0's."""
    global _store_lost
    deadline = time.monotonic() + 2  # a process that ends closes its files first
    while gone() is None and time.monotonic() < deadline:
        if holds_the_store():  # on whatever machine it was
            _store_lost = True
        time.sleep(0.1)
    return gone() is not None


def _launcher_name(process: psutil.Process) -> str | None:
    """By the script or module that a Python runs."""
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
