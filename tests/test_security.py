"""docs/security.md: every line has a test, and what it says of the whole code holds."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/security.md").read_text()
SOURCES = [*(ROOT / "diffmoe").rglob("*.py"), *(ROOT / "tools").glob("*.py"), ROOT / "train.py"]
REFERENCE = re.compile(r"(tests/[\w/]+\.py)::(\w+)")


def test_every_line_of_the_page_names_its_test():
    rows = [row for row in PAGE.splitlines() if row.startswith("|")]
    rows = [row for row in rows if not row.startswith("|---") and not row.endswith("| test |")]
    assert len(rows) > 20
    assert [row for row in rows if not REFERENCE.search(row)] == []


@pytest.mark.parametrize(("file", "name"), sorted(set(REFERENCE.findall(PAGE))))
def test_the_tests_that_the_page_names_are_there(file: str, name: str):
    assert f"def {name}(" in (ROOT / file).read_text()


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Every call in the code, with where it stands."""
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call):
                yield f"{source.relative_to(ROOT)}:{node.lineno} {ast.unparse(node.func)}", node


def test_nothing_unpickles():
    for where, call in calls():
        name = where.split()[1]
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert name not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec"), (
            where
        )
        assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), where
        assert given.get("allow_pickle", "False") == "False", where
        if name == "torch.load":
            assert given.get("weights_only") == "True", where


def test_no_library_is_told_to_run_a_models_code():
    assert [where for where, call in calls() if "trust_remote_code" in ast.unparse(call)] == []


def test_shells_are_started_in_one_place():
    started = {
        where.split(":")[0]
        for where, call in calls()
        if any(keyword.arg == "shell" for keyword in call.keywords)
    }
    assert started == {"diffmoe/data/fetching.py"}
