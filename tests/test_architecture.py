"""The picture of the rooms in docs/architecture.md, held: who may import whom."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Rooms by floor, the ground first. A module imports its own room and lower floors alone.
FLOORS = [
    {
        *("errors", "redaction", "files", "npz_files", "hash_cache", "seeding", "tree", "clock"),
        *("contact_sheet", "process"),
    },
    {"config"},
    {"conditions", "latent_spec", "work", "recipes"},
    {"parallel", "diffusion"},
    {"models", "data"},
    {"checkpoints", "text", "digits", "capacity"},
    {"export", "prepare"},
    {"conversion", "sampling"},
    {"cli", "pipeline", "evaluation", "routing_report"},
    {"training"},
    {"planning"},
    {"benchmarks", "comparison", "__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The ground floor's own order; what is not named here imports nothing of the package.
GROUND = {"errors": 1, "scratch": 1, "files": 2, "npz_files": 3, "hash_cache": 3, "process": 3}
# Rooms that another may not import although its floor would allow it, now or after a move.
NEVER = {
    "data": {"models", "text", "checkpoints"},
    "diffusion": {"models", "data"},
    "models": {"data"},
    "checkpoints": {"data", "prepare", "training"},
}
# What a room may never import, however low it stands: inference needs none of them.
LIBRARIES = {
    "models": {"deepspeed", "megatron", "webdataset", "wandb"},
    "export": {"deepspeed", "megatron", "webdataset", "wandb"},
    "diffusion": {"deepspeed", "megatron", "webdataset", "wandb"},
}


def modules() -> dict[str, Path]:
    """Every module of diffmoe/ by its dotted name."""
    paths = (ROOT / "diffmoe").rglob("*.py")
    dotted = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in dotted.items()}


def imports(path: Path) -> Iterator[str]:
    """All that a file imports, in functions and for types, too: modules, or names of tests."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; write the whole name"
            # `from diffmoe.room import module` names a module, others a name inside of one.
            whole = (f"{node.module}.{alias.name}" for alias in node.names)
            named = node.module.split(".")[0] == "tests"
            yield from (name if named or name in MODULES else node.module for name in whole)


MODULES = modules()
GRAPH = {
    name: sorted({other for other in imports(path) if other.split(".")[0] == "diffmoe"})
    for name, path in MODULES.items()
}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else "diffmoe"


def test_every_room_has_a_floor():
    assert {room(name) for name in MODULES} - {"diffmoe"} <= set(FLOOR)


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if name != "diffmoe"])
def test_arrows_go_down_only(name: str):
    for other in GRAPH[name]:
        if other == "diffmoe" or room(other) == room(name):
            continue
        lower = FLOOR[room(other)] < FLOOR[room(name)]
        on_ground = FLOOR[room(name)] == 0 and GROUND.get(room(other), 0) < GROUND.get(
            room(name), 0
        )
        assert lower or on_ground, f"{name} imports {other}"
        assert room(other) not in NEVER.get(room(name), ()), f"{name} imports {other}"


def test_no_modules_import_each_other():
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in GRAPH.get(name, ()):
            # The names of diffmoe itself are imported when they are asked for.
            if name != "diffmoe":
                visit(other)
        path.pop()
        done.add(name)

    for name in MODULES:
        visit(name)


@pytest.mark.parametrize("where", LIBRARIES)
def test_inference_imports_nothing_of_training(where: str):
    for name, path in MODULES.items():
        if room(name) == where:
            assert not {other.split(".")[0] for other in imports(path)} & LIBRARIES[where], name


LIGHT = """
import sys
import diffmoe
assert "torch" not in sys.modules
diffmoe.load, diffmoe.Pipeline
heavy = {"deepspeed", "megatron", "webdataset", "wandb"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_the_package_imports_nothing_before_it_is_asked_and_little_then():
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_function_has_more_than_eight_parameters():
    found = set()
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
                number = len([n for n in names if n not in ("self", "cls")])
                if number + len(node.args.kwonlyargs) > 8:
                    found.add(f"{module}.{node.name}")
    assert not found


def test_no_test_imports_a_test():
    for path in (ROOT / "tests").rglob("*.py"):
        named = [name for name in imports(path) if name.startswith("tests.")]
        wrong = [name for name in named if ".test_" in name or ".conftest" in name]
        assert not wrong, f"{path.relative_to(ROOT)}: {wrong}"
