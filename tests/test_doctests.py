"""Every public name has an example in its docstring, and the examples run as they stand."""

import doctest
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import diffmoe
from tests.helpers.hub import hub
from tests.helpers.models import exported
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import pack
from tests.helpers.tiny import tiny_config

METHODS = [name for name in vars(diffmoe.Pipeline) if name == "__call__" or name[0] != "_"]
NAMES = [*diffmoe.__all__, *(f"Pipeline.{name}" for name in METHODS)]
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Ran(NamedTuple):
    """examples: how many a docstring has. wrong: what doctest reports of those that fail."""

    examples: int
    wrong: str


def public(name: str) -> Any:
    value: Any = diffmoe
    for part in name.split("."):
        value = getattr(value, part)
    return value


def run(folder: Path) -> dict[str, Ran]:
    """The examples of each name, in a process of its own and in the folder."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    os.chdir(folder)
    with hub() as server:
        files = {file.name: file.read_bytes() for file in Path("exported/mnist").iterdir()}
        server.files["owner/digits"] = files
        os.environ |= {"HF_ENDPOINT": server.address, "HF_TOKEN": "hf_test"}
        os.environ["HF_HOME"] = str(folder / "cache")
        return {name: ran(name) for name in NAMES}


def ran(name: str) -> Ran:
    value = public(name)
    text = getattr(value, "__func__", value).__doc__ or ""
    examples = doctest.DocTestParser().get_doctest(text, {}, name, None, None)
    out, options = io.StringIO(), doctest.ELLIPSIS | doctest.REPORT_NDIFF
    doctest.DocTestRunner(optionflags=options, verbose=False).run(examples, out=out.write)
    return Ran(len(examples.examples), out.getvalue())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    folder = tmp_path_factory.mktemp("examples")
    sizes = {"model__in_channels": 1, "model__input_size": 28, "model__num_classes": 10}
    exported(folder / "exported/mnist", tiny_config(**sizes), class_names=DIGITS)
    pack(folder / "data/mnist", shape=(1, 28, 28), classes=10)
    return run_ranks(1, run, folder, connect=False, timeout=500)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_examples_of_a_public_name_run(name: str, results: dict[str, Ran]):
    assert results[name].examples >= 2, f"diffmoe.{name} has no example in its docstring"
    assert results[name].wrong == ""
