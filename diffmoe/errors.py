"""The exception for errors that a user can fix, and how commands report it."""

import io
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from diffmoe.redaction import printable

EXIT_USER_ERROR = 2
EXIT_STOPPED = 85  # train.py was asked to stop and has saved; slurm/common.sh knows the number
EXIT_INTERRUPTED = 130
TRAINING_PACKAGES = ("deepspeed", "megatron", "wandb")  # of the extra `train`


class UserError(Exception):
    """A wrong setting, file or folder. The message names it, its value, and what to do.

    >>> import diffmoe
    >>> try:
    ...     diffmoe.load_config("mnist", ["moe.capacity=8"])
    ... except diffmoe.UserError as error:
    ...     print(error)
    recipe mnist: moe.capacity=8.0 is more than moe.experts=4: every expert would take ...
    """


def describe_problem(problem: Mapping[str, Any]) -> str:
    """One of a pydantic ValidationError's `errors()`, as `field=value: what is wrong`."""
    field = ".".join(str(part) for part in problem["loc"]) or "the file"
    if problem["type"] == "missing":
        return f"{field} is missing"
    if problem["type"] == "extra_forbidden":
        return f"{field} is unknown (remove it; or was it written by a newer version?)"
    # Of our own validators without pydantic's "Value error, ".
    wrong = str(problem["ctx"]["error"]) if problem["type"] == "value_error" else problem["msg"]
    if not problem["loc"]:
        return wrong
    value = "" if isinstance(problem["input"], dict) else f"={problem['input']!r:.80}"
    return f"{field}{value}: {wrong}"


def missing_extra(error: ModuleNotFoundError) -> str | None:
    """What to install for training, where its packages are missing; None for any other module."""
    name = (error.name or "").partition(".")[0]
    if name not in TRAINING_PACKAGES:
        return None
    return f'{name} is not installed, which training and planning need: pip install -e ".[train]"'


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a tool's main function and exit.

    UserError, or a missing package of training: prints the message without a traceback, exit code
    2. Ctrl-C: exit code 130; every tool can be interrupted, as it resumes where it was or has
    changed nothing. Bytes that are not text, as in names of files, are printed as escapes.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except ModuleNotFoundError as error:
        message = missing_extra(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except UserError as error:
        message = "\n".join(printable(line) for line in str(error).split("\n"))
        print(f"error: {message}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    sys.exit(0)
