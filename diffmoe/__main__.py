"""python -m diffmoe: which commands there are."""

import ast
from pathlib import Path

import diffmoe

ROOT = Path(diffmoe.__file__).parents[1]
TEXT = """DiffMoE {version}. In a clone of the repository:

{commands}

COMMAND --help describes each. From Python:

{names}

import diffmoe; help(diffmoe.train) describes each."""


def commands(root: Path) -> dict[str, str]:
    """What each command of a clone does, the first line of its help; none in an installation."""
    files = [root / "train.py", *sorted((root / "tools").glob("*.py"))]
    found = {}
    for file in files:
        if file.is_file():
            text = ast.get_docstring(ast.parse(file.read_text())) or ""
            found[str(file.relative_to(root))] = text.partition("\n")[0]
    return found


def main() -> None:
    found = commands(ROOT)
    width = max(map(len, found), default=0)
    lines = [f"  python {name:{width}}  {text}" for name, text in found.items()]
    names = "  " + ", ".join(f"diffmoe.{name}" for name in diffmoe.__all__)
    listed = "\n".join(lines) or "  (this is an installation without the commands)"
    print(TEXT.format(version=diffmoe.__version__, commands=listed, names=names))


if __name__ == "__main__":
    main()
