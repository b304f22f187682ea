"""Classes by their numbers or by the names that a model knows."""

from collections.abc import Sequence
from pathlib import Path

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
