"""One run at a time in an output, whatever ends the other one."""

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffmoe.errors import UserError
from diffmoe.training import lease
from diffmoe.training.lease import Holder, Lease, hold
from tests.helpers.processes import wait_for_metrics
from tests.helpers.ranks import ranks_of
from tests.helpers.runs import metrics, newest, pack, run_config, train

ELSEWHERE = {"host": "n17", "machine": "another boot", "pid": 4321}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "STALE", 0.8)


def left(output: Path, **changes: object) -> Path:
    """A lease that nobody keeps alive, of this process but for the changes."""
    output.mkdir(exist_ok=True)
    file = output / "lease-5.json"
    file.write_text(json.dumps({**Holder.this_process()._asdict(), **changes}))
    return file


def files(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir())


def seconds_to_take(output: Path) -> float:
    began = time.monotonic()
    with hold(output):
        return time.monotonic() - began


@contextlib.contextmanager
def beating(file: Path, at: float) -> Iterator[None]:
    """A process elsewhere keeps the lease, by a clock of its own that says `at`."""
    process = os.fork()
    if process == 0:
        for beat in range(10**6):
            os.utime(file, (at, at + beat))
            time.sleep(0.05)
    try:
        yield
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_a_second_run_refuses_and_names_the_first(tmp_path: Path, impatient, monkeypatch):
    output = tmp_path / "run"
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with hold(output) as first:
        with pytest.raises(UserError) as error, hold(output):
            pass
        assert files(output) == ["lease-1.json"]
        first.check()
    said = (
        rf"output={output} is in use by process {os.getpid()} on {socket.gethostname()}, "
        r"Slurm job 77, started 20\S+; end that run first, or choose another output"
    )
    assert re.fullmatch(said, str(error.value))
    assert not output.exists()  # nothing was written there
    with hold(output):
        (output / "config.yaml").touch()
    assert files(output) == ["config.yaml"]


@pytest.mark.parametrize("reaped", [True, False])
def test_a_process_of_this_host_that_died_is_followed_at_once(tmp_path: Path, reaped: bool):
    ready, told = os.pipe()
    process = os.fork()
    if process == 0:
        with hold(tmp_path):
            os.write(told, b".")
            time.sleep(60)
    os.read(ready, 1)
    os.kill(process, signal.SIGKILL)
    if reaped:
        os.waitpid(process, 0)
    try:
        assert files(tmp_path) == ["lease-1.json"]
        assert seconds_to_take(tmp_path) < lease.BEAT / 2
        assert files(tmp_path) == []
    finally:
        if not reaped:
            os.waitpid(process, 0)


def test_a_later_process_of_the_same_number_is_not_taken_for_the_dead_one(tmp_path: Path):
    left(tmp_path, process="1")
    assert seconds_to_take(tmp_path) < lease.BEAT / 2


def test_the_same_slurm_job_requeued_takes_over_at_once(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    left(tmp_path, **ELSEWHERE, job="77", restart=0)
    assert seconds_to_take(tmp_path) < lease.BEAT / 2
    told = capsys.readouterr().err
    assert f"taking over {tmp_path}: it was held by process 4321 on n17, Slurm job 77" in told
    assert "this is the same Slurm job, requeued" in told


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"job": "77", "restart": 1},  # another step of this very job
        {"job": "78", "restart": 0},
        {"job": "", "restart": 0},
    ],
)
@pytest.mark.parametrize("clock", [-1e7, 1e7], ids=["its clock is late", "its clock is early"])
def test_on_another_host_the_heartbeat_decides(
    tmp_path: Path, impatient, monkeypatch, changes: dict, clock: float
):
    """By the change alone: clocks of two machines are not compared."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    file = left(tmp_path, **ELSEWHERE, **changes)
    with beating(file, time.time() + clock), pytest.raises(UserError, match="4321 on n17"):
        seconds_to_take(tmp_path)
    assert lease.STALE <= seconds_to_take(tmp_path) < lease.STALE + 2


@pytest.mark.slow
@pytest.mark.parametrize("content", [b"", b"\xff", b"[" * 10**5, b"{}", b'{"pid": "x"}'])
def test_a_lease_that_cannot_be_read_counts_like_any_other(
    tmp_path: Path, impatient, content: bytes
):
    file = left(tmp_path)
    file.write_bytes(content)
    with beating(file, time.time()), pytest.raises(UserError, match="in use by another run"):
        seconds_to_take(tmp_path)
    assert seconds_to_take(tmp_path) >= lease.STALE


@pytest.mark.slow
def test_of_many_that_take_over_one_wins(tmp_path: Path, impatient, monkeypatch):
    """Also where the file system knows neither hard links nor locks."""
    monkeypatch.setattr(os, "link", None)
    monkeypatch.setattr("fcntl.flock", None)
    left(tmp_path, **ELSEWHERE)
    processes = []
    for _ in range(6):
        process = os.fork()
        if process == 0:
            with contextlib.suppress(UserError), hold(tmp_path) as mine:
                time.sleep(3)
                os._exit(0 if mine.lost else 1)
            os._exit(0)
        processes.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]
    assert sorted(codes) == [0, 0, 0, 0, 0, 1]


@pytest.mark.slow
def test_between_look_and_file_the_folder_may_change_hands(tmp_path: Path, impatient, monkeypatch):
    """The stale lease was taken over and released, and a third run began, while we slept."""
    left(tmp_path, **ELSEWHERE)
    decide, others = lease._wait_for_the_end, []

    def slept(path: Path, me: Holder) -> str | None:
        ended = decide(path, me)
        if not others:
            path.unlink()
            others.append(Lease(tmp_path))
        return ended

    monkeypatch.setattr(lease, "_wait_for_the_end", slept)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
        seconds_to_take(tmp_path)
    assert not others[0].lost
    assert files(tmp_path) == ["lease-1.json"]
    others[0].release()


def test_a_holder_that_slept_notices_before_it_writes(tmp_path: Path, impatient):
    slept = Lease(tmp_path)
    slept._closing.set()  # as a suspended process: no more signs of life
    with hold(tmp_path):
        with pytest.raises(UserError) as error:
            slept.check()
        assert f"output={tmp_path} is no longer held by this run" in str(error.value)
        assert f"process {os.getpid()} on " in str(error.value)
        slept.release()
        assert files(tmp_path) == ["lease-2.json"]  # not what another one holds


def too_long(folder: Path) -> Path:
    return folder / ("x" * 300) / "run"


def a_file(folder: Path) -> Path:
    (folder / "run").touch()
    return folder / "run"


def a_loop(folder: Path) -> Path:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    return folder / "a/run"


def a_dangling_link(folder: Path) -> Path:
    (folder / "run").symlink_to("nothing")
    return folder / "run"


def not_ours(folder: Path) -> Path:
    (folder / "run").mkdir()
    return folder / "run"


@pytest.mark.root
@pytest.mark.parametrize("make", [too_long, a_file, a_loop, a_dangling_link, not_ours])
def test_an_output_that_cannot_be_had_is_told_in_a_sentence(
    tmp_path: Path, make: Callable[[Path], Path]
):
    output = make(tmp_path)
    user = os.geteuid()
    if make is not_ours:
        if user:
            pytest.skip("to be another user needs root")
        for folder in tmp_path.parents[:3]:
            folder.chmod(0o755)
        os.seteuid(65534)
    try:
        with pytest.raises(UserError) as error, hold(output):
            pass
    finally:
        os.seteuid(user)
    assert str(error.value).startswith(f"output={output} cannot be written: ")
    assert str(error.value).endswith("; choose another output")


@pytest.mark.slow
def test_two_runs_never_mix(tmp_path: Path):
    """One trains, a second refuses; the first sleeps, a third takes over; the first wakes."""
    pack(tmp_path / "data")
    config = run_config(tmp_path, 10**6, training__checkpoint_samples=40)
    with ranks_of(config, 1, hasty) as first:
        pid = first.processes[0].pid
        wait_for_metrics(config)
        other = config.replace({"logging.log_samples": 8})
        log = first.logs[0].rename(tmp_path / "first.log")
        with ranks_of(other, 1, hasty) as second:
            assert second.wait() == [2]
            assert f"is in use by process {pid} on {socket.gethostname()}" in second.told()
        os.kill(pid, signal.SIGSTOP)
        step = int(newest(config).name[5:]) if (Path(config.output) / "latest").exists() else 0
        last = config.replace({"training.total_samples": 8 * (step + 50)})
        with ranks_of(last, 1, hasty) as third:
            assert third.wait() == [0], third.told()
        found = {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")}
        os.kill(pid, signal.SIGCONT)
        assert first.wait() == [2]
    assert "is no longer held by this run" in log.read_text()
    assert {path: path.stat().st_mtime_ns for path in Path(config.output).rglob("*")} == found
    assert [line["step"] for line in metrics(config)] == list(range(1, step + 51))


@pytest.mark.parametrize("moment", ["before", "in the middle", "after"])
def test_a_save_is_no_checkpoint_once_the_folder_is_lost(tmp_path: Path, moment: str):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 2, training__checkpoint_samples=8)
    with pytest.raises(AssertionError, match="is no longer held by this run: process 4321 on n17"):
        train(config, prepare=LoseTheFolder(tmp_path / "run", moment))
    saved = [path.name for path in Path(config.output).glob("step-*")]
    assert saved == (["step-00000001"] if moment == "after" else [])
    assert not (tmp_path / "run/latest").exists()  # which is the other run's, as is retention
    if moment == "before":  # what another run may be writing there stays
        assert (tmp_path / "run/.step-00000001.tmp/theirs").exists()


class LoseTheFolder:
    """Another run takes the folder over before, in the middle of, or after the first save."""

    def __init__(self, output: Path, moment: str) -> None:
        self.output, self.moment = output, moment

    def __call__(self, rank: int) -> None:
        from diffmoe.training import async_save

        lease.STALE = 0.0  # always looks
        begin, write = async_save.Saver.begin, async_save.write_pieces
        commit = async_save.lifecycle.commit

        def beginning(*values):
            if self.moment == "before":
                self.lose()
                (self.output / ".step-00000001.tmp").mkdir()
                (self.output / ".step-00000001.tmp/theirs").touch()
            begin(*values)

        def writing(*values):
            written = write(*values)
            if self.moment == "in the middle":
                self.lose()
            return written

        def committing(*values):
            commit(*values)
            if self.moment == "after":
                self.lose()

        async_save.Saver.begin, async_save.write_pieces = beginning, writing
        async_save.lifecycle.commit = committing

    def lose(self) -> None:
        (self.output / "lease-1.json").unlink(missing_ok=True)
        left(self.output, **ELSEWHERE)


def hasty(rank: int) -> None:
    lease.BEAT, lease.STALE = 0.2, 1.5
