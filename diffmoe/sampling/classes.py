"""Classes by number or by name."""

import operator
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from diffmoe.errors import UserError


def class_number(name: str, names: Sequence[str], folder: Path) -> int:
    """The number of a class. names: the model's, empty where it has none. folder: for the error.

    Raises UserError for a name that the model does not have.
    """
    if name not in names:
        known = f"its names are {', '.join(names[:5])}, ..."
        raise UserError(
            f"class {name!r} is unknown to {folder}; "
            f"{known if names else 'it has no class names, give numbers'}"
        )
    return list(names).index(name)


def class_numbers(text: str, names: Sequence[str], folder: Path) -> list[int]:
    """The classes of `--classes 0-3,cat`: numbers, ranges and names; names may hold commas.

    A number is taken as a number even where it is also a name. Raises UserError for anything else.
    """
    parts, numbers = text.split(","), list[int]()
    while parts:
        lengths = range(len(parts), 0, -1)
        length = next((n for n in lengths if ",".join(parts[:n]) in names), 1)
        word, parts = ",".join(parts[:length]).strip(), parts[length:]
        ends = re.fullmatch(r"(\d{1,6})-(\d{1,6})", word)
        if ends and word not in names:
            if int(ends[1]) > int(ends[2]):
                raise UserError(f"--classes {word}: write a range as {ends[2]}-{ends[1]}")
            numbers += range(int(ends[1]), int(ends[2]) + 1)
            continue
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
    """The classes of a sequence or tensor of numbers and names, or of one name.

    Raises UserError for anything else.
    """
    if isinstance(labels, str):  # not its letters
        labels = [labels]
    if not isinstance(labels, Iterable) or getattr(labels, "ndim", 1) != 1:
        raise UserError(
            f"labels={labels!r}: give a list, one label per image, such as labels=[3, 0]"
        )
    found = [_label_number(label, names, folder) for label in labels]
    if not found:
        raise UserError("labels=[] asks for no image; give one label per image, such as labels=[3]")
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
