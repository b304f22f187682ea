"""The tools, run as users run them."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.helpers.ranks import _context, take_environment

ROOT = Path(__file__).parents[2]


def command(*words: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    """Without a launcher it is forked from a server that has imported torch, as ranks are: most of
    a short command's time is that import.
    """
    if not launcher:
        return forked(*words)
    start = [sys.executable, *launcher, *map(str, words)]
    return subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=120)


def told(*words: str | Path, launcher: tuple[str, ...] = ()) -> str:
    done = command(*words, launcher=launcher)
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
    **environment: str,
) -> subprocess.CompletedProcess:
    """Run a script in `cwd`, with more in its environment."""
    arguments = [script, *map(str, words)]
    with tempfile.TemporaryDirectory() as folder:
        process = _context.Process(
            target=_tool_main, args=(arguments, cwd, os.environ | environment, folder)
        )
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout)
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def _tool_main(arguments: list[str], cwd: Path, environment: dict[str, str], folder: str) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
    take_environment(environment)
    os.chdir(cwd)
    multiprocessing.set_start_method("fork", force=True)  # as in a plain process
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
