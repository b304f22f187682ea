"""Ending this process, and cleanup that must run even if it ends abruptly."""

import atexit
import os
from collections.abc import Callable
from typing import NoReturn

_cleanups: list[Callable[[], None]] = []


def at_exit(cleanup: Callable[[], None]) -> None:
    """Run `cleanup` at a normal exit and in `end_process`. It must be fast and safe to run twice.

    Forked processes inherit it: a cleanup has to check that it runs in the process it belongs to.
    """
    _cleanups.append(cleanup)
    atexit.register(cleanup)


def end_process(code: int) -> NoReturn:
    """Exit at once: run the cleanups, but wait for no thread, stream or library."""
    for cleanup in reversed(_cleanups):
        cleanup()
    os._exit(code)
