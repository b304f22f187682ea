"""Damaged weights are noticed when a model is opened; a file is read for that once per machine."""

import os
import shutil
from pathlib import Path

import pytest

import diffmoe
from diffmoe import hash_cache
from diffmoe.config import Config
from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError
from diffmoe.export.open import open_network
from diffmoe.export.writing import write_exported
from diffmoe.training import init_from
from tests.helpers.models import exported, flip_bytes, source_of
from tests.helpers.runs import newest, pack
from tests.helpers.tiny import tiny_config
from tests.helpers.tools import forked, tool

OPENERS = [
    pytest.param(lambda path, **how: diffmoe.load(path, device="cpu", **how), id="load"),
    pytest.param(lambda path, **how: diffmoe.Pipeline(path, device="cpu", **how), id="Pipeline"),
    pytest.param(open_network, id="open_network"),
]


@pytest.mark.parametrize("opened", OPENERS)
def test_four_flipped_bytes_of_an_export_are_noticed(opened, tmp_path: Path):
    folder = exported(tmp_path / "out")
    opened(folder)
    flip_bytes(folder / "model.safetensors")
    with pytest.raises(UserError, match=r"out/model\.safetensors .* differs from its checksum"):
        opened(folder)
    opened(folder, verify=False)


@pytest.mark.parametrize("opened", OPENERS)
def test_four_flipped_bytes_of_a_checkpoint_are_noticed(opened, single_run: Config, tmp_path: Path):
    checkpoint = shutil.copytree(newest(single_run), tmp_path / "step-00000003")
    opened(checkpoint)
    flip_bytes(next(checkpoint.glob("*.distcp")), place=-2000)
    with pytest.raises(UserError, match=r"\.distcp is damaged: its SHA-256"):
        opened(checkpoint)
    opened(checkpoint, verify=False)


def test_the_command_verifies_an_export_too(tmp_path: Path):
    folder = exported(tmp_path / "out")
    done = tool("checkpoint", "verify", folder)
    assert (done.returncode, done.stdout) == (0, f"{folder}  intact, 2 files\n")
    flip_bytes(folder / "model.safetensors")
    done = tool("checkpoint", "verify", folder)
    assert done.returncode == 2
    assert "model.safetensors is missing, or differs from its checksum" in done.stderr


def test_every_file_of_a_split_export_is_read(tmp_path: Path):
    folder = tmp_path / "out"
    write_exported(source_of(tiny_config()), folder, max_shard_bytes=40_000)
    for file in sorted(folder.glob("model-*.safetensors")):
        original = file.read_bytes()
        flip_bytes(file)
        with pytest.raises(UserError, match=file.name):
            diffmoe.load(folder, device="cpu")
        file.write_bytes(original)
    diffmoe.load(folder, device="cpu")


def test_a_run_does_not_start_from_damaged_weights(tmp_path: Path):
    folder = exported(tmp_path / "out", tiny_config())
    flip_bytes(folder / "model.safetensors")
    config = tiny_config(training__init=str(folder))
    manifest = Manifest.load(pack(tmp_path / "data"))
    with pytest.raises(UserError, match="differs from its checksum"):
        init_from.load(config, manifest, engine=None, network=None)


@pytest.mark.slow
def test_the_tool_refuses_a_damaged_model(tmp_path: Path):
    folder = exported(tmp_path / "out")
    flip_bytes(folder / "model.safetensors")
    out = tmp_path / "grid.png"
    done = forked("tools/sample.py", folder, "--steps", "1", "--out", out)
    assert done.returncode == 2
    assert "model.safetensors" in done.stderr
    assert not out.exists()


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are really read; those of a kilobyte are remembered, too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_cache, "_SMALL", 1000)
    read, real = [], hash_cache.sha256_of
    monkeypatch.setattr(hash_cache, "sha256_of", lambda path: read.append(path) or real(path))
    return read


def test_a_file_is_read_once_and_again_when_it_changed(counted: list[Path], tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(b"a" * 2000)
    first = hash_cache.cached_sha256(file)
    assert hash_cache.cached_sha256(file) == first == hash_cache.sha256_of(file)
    assert len(counted) == 2  # one of them is the line above
    before = file.stat()
    file.write_bytes(b"b" * 2000)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync -t does
    assert hash_cache.cached_sha256(file) != first
    os.utime(file, ns=(0, 1))
    hash_cache.cached_sha256(file)
    assert len(counted) == 4
    tiny = tmp_path / "tiny"
    tiny.write_bytes(b"a")
    hash_cache.cached_sha256(tiny)
    hash_cache.cached_sha256(tiny)
    assert counted[4:] == [tiny, tiny]


def test_a_model_that_is_opened_again_is_not_read_again(counted: list[Path], tmp_path: Path):
    folder = exported(tmp_path / "out")
    diffmoe.load(folder, device="cpu")
    diffmoe.load(folder, device="cpu")
    weights = folder / "model.safetensors"
    assert counted.count(weights) == 1
    flip_bytes(weights)
    with pytest.raises(UserError, match="differs from its checksum"):
        diffmoe.load(folder, device="cpu")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"sha256": 3}', "\x00" * 9])
def test_a_damaged_memory_is_no_hindrance(content: str, counted: list[Path], tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(b"a" * 2000)
    first = hash_cache.cached_sha256(file)
    (entry,) = (tmp_path / "cache" / "diffmoe" / "sha256").iterdir()
    entry.write_text(content)
    assert hash_cache.cached_sha256(file) == first
    assert hash_cache.cached_sha256(file) == first
    assert len(counted) == 2


def test_without_a_folder_for_the_memory_files_are_read_each_time(
    counted: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "blocked").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "blocked"))
    file = tmp_path / "file"
    file.write_bytes(b"a" * 2000)
    assert hash_cache.cached_sha256(file) == hash_cache.cached_sha256(file)
    assert len(counted) == 2
