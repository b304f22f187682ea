"""Classes by their numbers or by the names that a model knows."""

import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffmoe.errors import UserError


def class_number(name: str, names: Sequence[str], folder: Path) -> int:
    """The number of a class. names: the model's, empty where it has none. folder: for the message.

    Raises UserError for a name that the model does not know.
    """
    if name not in names:
        known = f"its names are {', '.join(names[:5])}, ..."
        raise UserError(
            f"class {name!r} is unknown to {folder}; "
            f"{known if names else 'it has no class names, give numbers'}"
        )
    return list(names).index(name)


def class_numbers(text: str, names: Sequence[str], folder: Path) -> list[int]:
    """Of `--classes 0,cat`, numbers and names in any mixture; a name may hold commas itself.

    What is a number stays one, also where it is a name. Raises UserError as `class_number` does.
    """
    parts, numbers = text.split(","), []
    while parts:
        lengths = range(len(parts), 0, -1)
        length = next((n for n in lengths if ",".join(parts[:n]) in names), 1)
        word, parts = ",".join(parts[:length]).strip(), parts[length:]
        try:
            numbers.append(int(word))
        except ValueError:
            if not names:
                raise UserError(
                    f"--classes {text}: write numbers with commas, such as 0,1; {folder} has no "
                    "class names"
                ) from None
            numbers.append(class_number(word, names, folder))
    return numbers


def label_numbers(labels: Any, names: Sequence[str], folder: Path) -> list[int]:
    """Of a sequence (or a tensor) of numbers and names. Raises UserError for anything else."""
    if (
        isinstance(labels, str)
        or not isinstance(labels, Iterable)
        or getattr(labels, "ndim", 1) != 1
    ):
        raise UserError(
            f"labels={labels!r}: give a list, one label an image, such as labels=[3, 0]"
        )
    found = [_label_number(label, names, folder) for label in labels]
    if not found:
        raise UserError("labels=[] asks for no image; give one label an image, such as labels=[3]")
    return found


def _label_number(label: Any, names: Sequence[str], folder: Path) -> int:
    if isinstance(label, str):
        return class_number(label, names, folder)
    if not isinstance(label, bool):
        try:
            return operator.index(label)
        except TypeError:
            pass
    raise UserError(f"label {label!r} is neither the number nor the name of a class")
