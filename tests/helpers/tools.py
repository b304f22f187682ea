"""The tools, run as users run them."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(*words: str | Path, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    start = [sys.executable, *launcher]
    words = [str(word) for word in words]
    return subprocess.run([*start, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


def told(*words: str | Path, launcher: tuple[str, ...] = ()) -> str:
    done = command(*words, launcher=launcher)
    assert done.returncode == 0, done.stderr
    return done.stdout
