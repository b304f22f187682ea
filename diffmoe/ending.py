"""The end of this process, and what must be done even where it comes at once."""

import atexit
import os
from collections.abc import Callable
from typing import NoReturn

_duties: list[Callable[[], None]] = []


def at_any_end(duty: Callable[[], None]) -> None:
    """Do it at an orderly end and in `end_process`; it must be quick, and harmless if done twice.

    A forked process has the parent's duties, too: they must know whose they are.
    """
    _duties.append(duty)
    atexit.register(duty)


def end_process(code: int) -> NoReturn:
    """Without waiting for threads, streams, or what libraries would do at an orderly end."""
    for duty in reversed(_duties):
        duty()
    os._exit(code)
