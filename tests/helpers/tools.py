"""The tools, run as users run them."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.ranks import _context, joined, of_rank, take_environment

ROOT = Path(__file__).parents[2]


def command(
    *words: str | Path, launcher: tuple[str, ...] = (), ranks: int | None = None
) -> subprocess.CompletedProcess:
    """Without a launcher it is forked from a server that has imported torch, as ranks are: most of
    a short command's time is that import.
    """
    if not launcher:
        return forked(*words, ranks=ranks)
    start = [sys.executable, *launcher, *map(str, words)]
    return subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=120)


def told(*words: str | Path, **how: Any) -> str:
    done = command(*words, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tool(name: str, *words: str | Path | int, **environment: str) -> subprocess.CompletedProcess:
    """Run tools/NAME.py."""
    return forked(f"tools/{name}.py", *words, HF_HUB_OFFLINE="1", **environment)


def forked(
    script: str,
    *words: str | Path | int,
    cwd: Path = ROOT,
    timeout: float = 300,
    ranks: int | None = None,
    prepare: Callable[[], None] | None = None,
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run a script in `cwd`, with more in its environment.

    ranks: so many of them, as a launcher starts them; what they write follows each other by rank.
    prepare: called before the script; can be sent to a process.
    """
    arguments = [script, *map(str, words)]
    settings = (os.environ if ranks is None else joined(ranks)) | environment
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, str(rank)) for rank in range(ranks or 1)]
        processes = []
        for rank, place in enumerate(places):
            place.mkdir()
            own = settings if ranks is None else of_rank(settings, rank)
            process = _context.Process(
                target=_tool_main, args=(arguments, cwd, own, place, prepare)
            )
            process.start()
            processes.append(process)
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        if None in codes:
            for process in processes:
                process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout)
        out, err = (
            "".join((place / name).read_text() for place in places) for name in ("stdout", "stderr")
        )
    return subprocess.CompletedProcess(arguments, max(codes, key=bool), out, err)


def _tool_main(
    arguments: list[str],
    cwd: Path,
    environment: dict[str, str],
    folder: Path,
    prepare: Callable[[], None] | None,
) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    take_environment(environment)
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # as in a plain process
    if prepare is not None:
        prepare()
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
