"""Whatever lies in a run's folder: a sentence that names it, or the right result."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffmoe.checkpoints.folder import complete, names, verify
from diffmoe.config import Config
from diffmoe.errors import UserError
from diffmoe.training.resume import find_checkpoint, make_way
from tests.helpers.commands import command
from tests.helpers.runs import pack, run_config, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Config:
    """Checkpoints and snapshots at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("folder")
    pack(folder / "data")
    config = run_config(
        folder,
        2,
        training__checkpoint_samples=8,
        training__snapshot_samples=8,
        training__ema_stds=[0.1],
    )
    train(config)
    return config


@pytest.fixture
def run(tmp_path: Path, trained: Config) -> Config:
    for name in ("run", "data"):
        shutil.copytree(Path(trained.output).with_name(name), tmp_path / name)
    return trained.replace({"output": str(tmp_path / "run"), "data.path": str(tmp_path / "data")})


def replaced(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def loop(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to("nothing")


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def listing(name: str) -> Callable[[Path], None]:
    """checksums.json names a file of this name."""

    def change(file: Path) -> None:
        listed = json.loads(file.read_text())
        listed["files"][name] = {"bytes": 0, "sha256": ""}
        file.write_text(json.dumps(listed))

    return change


def closed(path: Path) -> None:
    path.chmod(0)


FAULTS: dict[str, tuple[str, Callable[[Path], None]]] = {
    "the checkpoint is a loop": ("", loop),
    "the checkpoint is a dangling link": ("", dangling),
    "the checkpoint is closed": ("", closed),
    "checksums are a loop": ("checksums.json", loop),
    "checksums are a folder": ("checksums.json", a_folder),
    "checksums are closed": ("checksums.json", closed),
    "checksums are deep": ("checksums.json", lambda file: replaced(file, b"[" * 10**5)),
    "checksums are no text": ("checksums.json", lambda file: replaced(file, b"\xff\xfe\0")),
    "a name is too long": ("checksums.json", listing("x" * 300)),
    "a name leads out": ("checksums.json", listing("../run.json")),
    "a name holds a zero": ("checksums.json", listing("a\0b")),
    "a name is half a letter": ("checksums.json", listing("\ud800")),
    "tensors are a loop": ("__0_0.distcp", loop),
    "tensors are a folder": ("__0_0.distcp", a_folder),
    "tensors are closed": ("__0_0.distcp", closed),
    "run.json is a loop": ("run.json", loop),
    "run.json is closed": ("run.json", closed),
    "run.json is deep": ("run.json", lambda file: replaced(file, b"[" * 10**5)),
    "run.json is flipped": ("run.json", lambda file: replaced(file, file.read_bytes()[::-1])),
    "run.json has another clock": ("run.json", lambda file: replaced(file, _about(clock=7))),
    "run.json has no samples": ("run.json", lambda file: replaced(file, _about(clock={"step": 2}))),
    "run.json has no settings": ("run.json", lambda file: replaced(file, _about(config=[1]))),
}


def _about(**changes: object) -> bytes:
    about = {"clock": {"samples": 16, "step": 2}, "optimizer_steps": 2, "config": {}, "latents": {}}
    return json.dumps(about | changes).encode()


@contextlib.contextmanager
def somebody(folder: Path) -> Iterator[None]:
    """Not root, to whom nothing is closed."""
    if os.geteuid():
        yield
        return
    for parent in folder.parents[:3]:
        parent.chmod(0o755)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, 65534, -1, follow_symlinks=False)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_told_and_passed_over(
    run: Config,
    tmp_path: Path,
    tool,
    fault: str,
):
    folder = Path(run.output)
    broken, name = folder / "step-00000002", FAULTS[fault][0]
    FAULTS[fault][1](broken / name)
    closed = fault.endswith("closed")
    with somebody(tmp_path) if closed else contextlib.nullcontext():
        problems = verify(broken)
        assert problems, fault
        assert str(broken) in problems[0]
        assert names(folder) == ["step-00000001", "step-00000002"]
        found = find_checkpoint(run, "auto")
        assert found.checkpoint == folder / "step-00000001"
        assert f"{broken} is passed over: {problems[0]}" in found.notes
        with pytest.raises(UserError):
            find_checkpoint(run, str(broken))
        assert tool("verify", folder)[0] == 2
        code, told = tool("list", folder)
        assert code == 0, told
        code, told = tool("prune", folder, "--keep-last", 1, "--keep-samples", 8)
        assert (code, told.splitlines()[-1][:15]) == (0, "deleted nothing"), told
        if not closed:  # torch is imported bit by bit, and belongs to root
            code, told = tool("show", folder)
            assert code == 0 or name == "run.json", told
            code, told = tool("ema", folder, "--std", 0.1, "--out", tmp_path / "average")
            assert code == 0 or name == "run.json", told


def test_a_folder_that_cannot_be_listed_is_no_empty_one(run: Config, tmp_path: Path):
    """Else the run would begin afresh in it."""
    Path(run.output).chmod(0o300)
    with somebody(tmp_path), pytest.raises(UserError) as error:
        find_checkpoint(run, "auto")
    assert str(error.value) == f"{run.output} cannot be listed: Permission denied"


@pytest.mark.parametrize("name", ["config.yaml", "latest"])
def test_what_cannot_be_replaced_is_named(run: Config, name: str):
    a_folder(Path(run.output) / name)
    with pytest.raises(UserError, match=f"cannot be written: Is a directory .*{name}"):
        make_way(run, find_checkpoint(run, "auto"))


def test_metrics_that_cannot_be_read_are_named(run: Config):
    a_folder(Path(run.output) / "metrics.jsonl")
    longer = run.replace({"training.total_samples": 24})
    with pytest.raises(AssertionError, match=r"UserError: .*metrics.jsonl cannot be read"):
        train(longer)


@pytest.mark.parametrize("path", ["x" * 300, "loop/run"])
def test_a_path_that_can_be_none_is_told(run: Config, tmp_path: Path, path: str):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError) as error:
        complete(tmp_path / path)
    assert str(error.value).startswith(f"{tmp_path / path} ")
    with pytest.raises(UserError):
        find_checkpoint(run, str(tmp_path / path))


@pytest.mark.slow
def test_strange_names_disturb_nobody(run: Config):
    """Links that lead nowhere or to themselves, names that are no text, in a folder of such a name.

    A run starts there, and the tools print its name as far as a terminal can show it.
    """
    folder = Path(os.fsdecode(os.fsencode(run.output) + b"-\xff\xfe"))
    Path(run.output).rename(folder)
    for name in (b"\xff\xfe", b"step-\xff", b"step-00000003", b".step-00000004.tmp"):
        os.symlink(name, os.fsencode(folder) + b"/" + name)
    config = run.replace({"output": str(folder), "training.total_samples": 32})
    assert train(config) == [True]
    assert names(folder) == [f"step-0000000{step}" for step in (1, 2, 3, 4)]
    assert not os.path.lexists(folder / ".step-00000004.tmp")
    done = command(sys.executable, "tools/checkpoint.py", "verify", str(folder))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("  whole") == 8
