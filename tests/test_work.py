"""Files that appear whole and once, also where a file system has no hard links."""

import errno
import json
import os
import threading
from pathlib import Path

import pytest

from diffmoe import work
from diffmoe.work import write_json_once
from tests.helpers.samples import images_of, make


def refused(source: Path, target: Path) -> None:
    raise OSError(errno.EPERM, "Operation not permitted", str(source))


@pytest.fixture(params=["links", "no links"])
def file_system(request, monkeypatch):
    """As many FUSE, FAT and SMB mounts refuse it."""
    if request.param == "no links":
        monkeypatch.setattr(os, "link", refused)


@pytest.mark.usefixtures("file_system")
def test_of_many_writers_one_writes(tmp_path, monkeypatch):
    file, wrote, ready = tmp_path / "once.json", [], threading.Barrier(8)

    def write(number: int) -> None:
        ready.wait()
        wrote.append((number, write_json_once(file, number)))

    # Threads share a process, and so the temporary name that carries its number.
    monkeypatch.setattr(
        work,
        "temporary_name",
        lambda target: target.with_name(f"{target.name}.{threading.get_ident()}.tmp"),
    )
    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [number for number, won in wrote if won]
    assert len(winners) == 1
    assert json.loads(file.read_text()) == winners[0]
    assert [path.name for path in tmp_path.iterdir()] == ["once.json"]
    assert write_json_once(file, "late") is False
    assert json.loads(file.read_text()) == winners[0]


@pytest.mark.usefixtures("file_system")
def test_a_folder_of_samples_is_finished(tmp_path):
    made = make(tmp_path / "out")
    assert made.closes
    assert len(images_of(tmp_path / "out")) == 11
    names = sorted(path.name for path in (tmp_path / "out").glob("[!.]*"))
    assert names == [*(f"samples-00000{part}.npz" for part in range(3)), "samples.json"]


def test_a_claim_of_a_process_that_was_killed_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(work, "CLAIM_SECONDS", 0.2)
    (tmp_path / "once.json.claim").touch()
    assert write_json_once(tmp_path / "once.json", 1) is True
    assert [path.name for path in tmp_path.iterdir()] == ["once.json"]
