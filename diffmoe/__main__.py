"""diffmoe COMMAND, or python -m diffmoe COMMAND: what train.py and the tools of a clone do."""

import ast
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import diffmoe
from diffmoe.errors import EXIT_USER_ERROR

PACKAGE = Path(diffmoe.__file__).parent
TEXT = """DiffMoE {version}: diffmoe COMMAND ...

{commands}

A unique beginning of a name will do; COMMAND --help describes each. What the help writes as
python tools/NAME.py is diffmoe NAME here. On several ranks: torchrun ... -m diffmoe COMMAND.
From Python:

{names}

import diffmoe; help(diffmoe.train) describes each."""


def commands() -> dict[str, Path]:
    """Name and file of each: of the clone that the package lies in, else of the installation."""
    clone = PACKAGE.parent
    if (clone / "train.py").is_file():
        files = [clone / "train.py", *sorted((clone / "tools").glob("*.py"))]
    else:  # setup.py puts all of them there
        files = sorted((PACKAGE / "commands").glob("*.py"))
        files.sort(key=lambda file: file.stem != "train")
    return {file.stem.replace("_", "-"): file for file in files}


def chosen(name: str, known: dict[str, Path]) -> Path:
    """The command of that name, or the only one that begins so. Ends the process if none is."""
    name = name.replace("_", "-")
    fitting = [name] if name in known else [one for one in known if one.startswith(name)]
    if len(fitting) != 1:
        told = "could be " + " or ".join(fitting) if fitting else f"there are {', '.join(known)}"
        print(f"error: no command {name}; {told}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    return known[fitting[0]]


def main() -> None:
    known = commands()
    words = sys.argv[1:]
    if words and not words[0].startswith("-"):
        file = chosen(words[0], known)
        sys.argv = [f"diffmoe {file.stem.replace('_', '-')}", *words[1:]]
        run(file)
        return
    width = max(map(len, known))
    lines = [f"  {name:{width}}  {summary(file)}" for name, file in known.items()]
    names = "  " + ", ".join(f"diffmoe.{name}" for name in diffmoe.__all__)
    print(TEXT.format(version=diffmoe.__version__, commands="\n".join(lines), names=names))


def run(file: Path) -> None:
    """As `python FILE`, but with the words that are in sys.argv now."""
    spec = spec_from_file_location("__main__", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["__main__"] = module
    spec.loader.exec_module(module)


def summary(file: Path) -> str:
    """The first line of a command's help."""
    return (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]


if __name__ == "__main__":
    main()
