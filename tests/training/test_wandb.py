"""A run's page on wandb, with wandb itself: offline, and against a server on this machine."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from diffmoe.training import wandb_run
from tests.helpers.processes import TRAIN, environment, free_port, write_config
from tests.helpers.runs import metrics, newest, pack, run_config, train


class Keyless:
    """A machine without a wandb key, whoever runs the test."""

    def __init__(self, home: Path, **more: str) -> None:
        self.home, self.more = home, more

    def __call__(self, rank: int) -> None:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            del os.environ[name]
        os.environ |= {"HOME": str(self.home), "NETRC": str(self.home / "netrc"), **self.more}


def records(folder: Path) -> Iterator[tuple[str, Any]]:
    """What wandb keeps of every start under `folder`, oldest first: the page's id, a record."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # as at a process's end: what this one logged is flushed
    for file in sorted(folder.glob("wandb/*run-*/run-*.wandb")):
        for data in _chunks(file.read_bytes()):
            yield file.stem.removeprefix("run-"), Record.FromString(data)


def history(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines that were logged, by page."""
    pages: dict[str, list[dict[str, Any]]] = {}
    for page, record in records(folder):
        if record.HasField("history"):
            items = record.history.item
            line = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
            pages.setdefault(page, []).append(line)
    return pages


def _chunks(content: bytes) -> list[bytes]:
    """wandb's file is a log of LevelDB: blocks of 32 KiB, chunks of checksum, length and kind."""
    block, at, found, parts = 32768, 7, [], b""
    while at + 7 <= len(content):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(parts)
            parts = b""
    return found


@pytest.mark.slow
def test_offline_starts_go_on_as_one_page_with_samples_for_its_axis(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 2, logging__wandb=True)
    assert train(config, prepare=Keyless(tmp_path)) == [True]
    longer = config.replace({"training.total_samples": 32})
    assert train(longer, prepare=Keyless(tmp_path)) == [True]
    (lines,) = history(Path(config.output)).values()
    assert [line["samples"] for line in lines] == [8, 16, 24, 32]
    assert [line["_step"] for line in lines] == [1, 2, 3, 4]
    assert [line["loss"] for line in lines] == [line["loss"] for line in metrics(config)]
    assert {"gradient_norm", "thresholds/1/3", "capacity_loss/0"} <= lines[0].keys()
    axes = [
        record.metric for _, record in records(Path(config.output)) if record.HasField("metric")
    ]
    assert ("*", "samples") in [(axis.glob_name, axis.step_metric) for axis in axes]


@pytest.mark.slow
def test_an_older_checkpoint_gets_a_page_of_its_own(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 4, logging__wandb=True, training__checkpoint_samples=16)
    train(config, prepare=Keyless(tmp_path))
    first = (Path(config.output) / "wandb_id").read_text().split()[0]
    train(config, resume=f"{config.output}/step-00000002", prepare=Keyless(tmp_path))
    second = (Path(config.output) / "wandb_id").read_text().split()[0]
    pages = history(Path(config.output))
    assert first != second
    assert [line["samples"] for line in pages[first]] == [8, 16, 24, 32]
    assert [line["samples"] for line in pages[second]] == [24, 32]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["init", "log", "finish"])
def test_a_failing_wandb_stops_no_run(tmp_path: Path, moment: str):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 3, logging__wandb=True)
    assert train(config, prepare=FailingWandb(moment)) == [True]
    assert newest(config).name == "step-00000003"
    assert [math.isfinite(line["loss"]) for line in metrics(config)] == [True] * 3


class FailingWandb:
    """wandb in which one function raises."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def __call__(self, rank: int) -> None:
        import wandb

        class Run:
            def define_metric(run, *_: Any, **__: Any) -> None:
                pass

            def log(run, values: dict, step: int) -> None:
                run.fail("log")

            def finish(run) -> None:
                run.fail("finish")

            def fail(run, moment: str) -> None:
                if moment == self.moment:
                    raise OSError("no space left on device")

        def init(**_: Any) -> Run:
            Run().fail("init")
            return Run()

        wandb.init = init


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Short limits, no key of this machine's user; gives what is said."""
    import wandb

    monkeypatch.setattr(wandb_run, "START_SECONDS", 8.0)
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "run").mkdir()
    yield []
    wandb.teardown()
    os.environ.pop("WANDB_SERVICE", None)  # later processes would take this one's


@pytest.mark.slow
def test_a_page_of_an_older_version_goes_on(tmp_path: Path, quick: list[str]):
    """Its file held the id alone, and wandb's steps were samples."""
    (tmp_path / "run" / "wandb_id").write_text("53a5ea68")
    page = wandb_run.WandbRun(run_config(tmp_path, 1), 640, fork=False, say=quick.append)
    page.log(648, lambda _: {"loss": 1.0})
    page.finish()
    (line,) = history(tmp_path / "run")["53a5ea68"]
    assert (line["_step"], line["samples"]) == (641, 648)


@pytest.mark.slow
def test_a_server_that_does_not_answer_makes_the_start_an_offline_one(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    page = wandb_run.WandbRun(run_config(tmp_path, 1), 0, fork=False, say=quick.append)
    page.log(8, lambda _: {"loss": 1.0})
    page.finish()
    assert len(quick) == 1
    assert "wandb is offline, its server did not answer" in quick[0]
    (lines,) = history(tmp_path / "run").values()
    assert [line["loss"] for line in lines] == [1.0]


@pytest.mark.slow
def test_a_server_that_vanishes_holds_up_the_end_for_a_bounded_time(
    tmp_path: Path, quick: list[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(wandb_run, "FINISH_SECONDS", 2.0)
    with Server() as server:
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", server.address)
        page = wandb_run.WandbRun(run_config(tmp_path, 1), 0, fork=False, say=quick.append)
        page.log(8, lambda _: {"loss": 1.0})
        assert quick == []
        server.gone.set()
        page.log(16, lambda _: {"loss": 0.5})
        page.finish()
    assert "wandb did not finish" in quick[0]
    assert "wandb sync" in quick[0]
    (lines,) = history(tmp_path / "run").values()
    assert [line["loss"] for line in lines] == [1.0, 0.5]


class Server:
    """Answers as wandb's server does at a run's start, until it is gone: then it never answers."""

    def __init__(self) -> None:
        self.gone = gone = threading.Event()

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                asked = self.rfile.read(int(self.headers.get("content-length", 0))).decode()
                if gone.is_set():
                    time.sleep(60)
                project = {"id": "p", "name": "diffmoe", "entity": {"id": "e", "name": "e"}}
                page = {"id": "i", "name": "n", "displayName": "n", "config": "{}"}
                page |= {"project": project, "historyLineCount": 0}
                data = {}
                if "UpsertBucket" in asked:
                    data = {"upsertBucket": {"bucket": page, "inserted": True}}
                answer = json.dumps({"data": data}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):
                    self.wfile.write(answer)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.server.shutdown()


@pytest.mark.slow
def test_a_run_ends_well_although_wandbs_process_hangs(tmp_path: Path):
    """Two ranks: the other one must not take rank 0 for dead, and the exit code is the run's."""
    pack(tmp_path / "data")
    (tmp_path / "tmp").mkdir()
    config = run_config(tmp_path, 200, logging__wandb=True)
    hooked = (
        "import runpy, sys\n"
        "from diffmoe.training import wandb_run, watchdog\n"
        "wandb_run.FINISH_SECONDS, watchdog.SILENCE = 3.0, 3.0\n"
        f"sys.argv[0] = {TRAIN!r}\n"
        f"runpy.run_path({TRAIN!r}, run_name='__main__')"
    )
    settings = environment(
        HOME=str(tmp_path), TMPDIR=str(tmp_path / "tmp"), WANDB_MODE="offline", WORLD_SIZE="2"
    )
    settings.pop("WANDB_SERVICE", None)
    settings |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", hooked, "--config", write_config(config)],
            env={**settings, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    core: list[psutil.Process] = []
    while not core:
        assert ranks[0].poll() is None, ranks[0].stderr.read()
        time.sleep(0.05)
        children = psutil.Process(ranks[0].pid).children()
        core = [child for child in children if child.name().startswith("wandb-core")]
    time.sleep(1)
    core[0].send_signal(signal.SIGSTOP)
    told = [rank.communicate(timeout=90)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    assert "wandb did not finish" in told[0]
    assert "died" not in told[0] + told[1]
    assert not core[0].is_running() or core[0].status() == psutil.STATUS_ZOMBIE
    assert list((tmp_path / "tmp").iterdir()) == []
