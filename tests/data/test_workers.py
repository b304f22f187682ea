"""Workers of the stream: however they are started, and however little memory can be shared."""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffmoe.data import workers as data_workers
from diffmoe.data.captions import Captions
from diffmoe.data.manifest import TextContent
from diffmoe.training.telemetry import Telemetry
from tests.helpers.runs import run_config
from tests.helpers.streams import RAGGED, batches, equal

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, pack):
    """Shards whose batches carry a caption of every sample."""
    directory = tmp_path_factory.mktemp("captioned")
    text = TextContent(encoder="bytes", length=64)
    return directory, pack(directory, RAGGED, lambda index: Captions([f"image {index}"]), text=text)


@pytest.fixture(params=["spawn", "forkserver"])
def start_method(request):
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method(request.param, force=True)
    yield request.param
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_may_be_started_without_a_fork(captioned, tmp_path, start_method, capsys):
    """With the report of a run, which holds a progress bar; a bad shard still comes through it."""
    telemetry = Telemetry(run_config(tmp_path, 4), active=True)
    telemetry.begin(0)
    directory = tmp_path / "data"
    shutil.copytree(captioned[0], directory)
    (directory / "000003.tar").write_bytes(b"")
    options = {"steps": 6, "max_bad_shards": 1, "captions": True}
    alone = batches(directory, captioned[1], **options, report=lambda line: None)
    capsys.readouterr()
    found = batches(directory, captioned[1], workers=1, report=telemetry.say, **options)
    telemetry.bar.close()
    assert equal(found, alone)
    assert re.findall(r"(\d{6})\.tar cannot be read", capsys.readouterr().err) == ["000003"]


def test_without_room_batches_come_through_pipes_and_are_the_same(captioned, monkeypatch):
    told = []
    options = {"captions": True, "report": told.append}
    whole = batches(*captioned, **options)
    assert equal(batches(*captioned, workers=2, **options), whole)
    assert told == []
    monkeypatch.setattr(data_workers, "free_shared_memory", lambda: 4000)
    assert equal(batches(*captioned, workers=2, **options), whole)
    (line,) = told
    assert "/dev/shm" in line
    assert "--shm-size" in line


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_room_of_a_machine_is_shared_by_its_ranks(monkeypatch, ranks):
    monkeypatch.setattr(data_workers, "free_shared_memory", lambda: 800)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert data_workers.fits_shared_memory(800 // ranks)
    assert not data_workers.fits_shared_memory(800 // ranks + 1)
    monkeypatch.setattr(data_workers, "free_shared_memory", lambda: None)  # no /dev/shm
    assert data_workers.fits_shared_memory(1 << 60)


IN_A_CONTAINER = """
import sys
from itertools import islice
from pathlib import Path
import torch
from diffmoe.data.lanes import DataSource
from diffmoe.data.stream import LatentStream
from diffmoe.data.manifest import Manifest
folder = Path(sys.argv[1])
manifest = Manifest.load(folder)
for workers in (0, 2):
    source = DataSource(folder, manifest, lanes=4, seed=3)
    stream = LatentStream(source, range(4), 16, workers=workers, captions=True)
    total = sum(batch.text.tokens.double().sum() + batch.latents.double().sum()
                for batch in islice(stream, 8))
    print(workers, float(total))
"""


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_container_with_64_mb_of_shared_memory_reads_padded_text(captioned, tmp_path):
    """Long captions of bytes take 8 bytes a place: 16 MB a batch, and 4 of each worker wait."""
    directory = tmp_path / "data"
    shutil.copytree(captioned[0], directory)
    manifest = captioned[1].model_copy(
        update={"text": TextContent(encoder="bytes", length=1 << 15)}
    )
    manifest.save(directory)
    inside = 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$0" -c "$1" "$2"'
    probe = subprocess.run(
        ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64m tmpfs /dev/shm"],
        capture_output=True,
    )
    if probe.returncode:
        pytest.skip("no mount of its own: needs root")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", inside, sys.executable, IN_A_CONTAINER, directory],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    alone, workers = (line.split()[1] for line in done.stdout.splitlines())
    assert alone == workers
    assert "/dev/shm has 67 MB free" in done.stderr
