"""The one exception for input that a user can mend, and how commands tell it."""

import io
import sys
from collections.abc import Callable
from typing import NoReturn

from diffmoe.redaction import printable

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """A wrong setting, file or folder: the message names it, its value and the way out."""


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a tool. A UserError is printed alone, without a traceback, and exits with code 2.

    Ctrl-C exits with 130: every tool goes on where it was, or has changed nothing. What is no text,
    as the names of files may be, is printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except UserError as error:
        told = "\n".join(printable(line) for line in str(error).split("\n"))
        print(f"error: {told}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    sys.exit(0)
