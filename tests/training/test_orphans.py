"""A launcher's end, a closed terminal, a second Ctrl-C: what can be saved is, and nothing stays."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from diffmoe.config import Config
from tests.helpers.commands import (
    ROOT,
    TORCHRUN,
    TRAIN,
    deepspeed,
    environment,
    wait_for_metrics,
    write_config,
)
from tests.helpers.processes import ranks_of
from tests.helpers.runs import clock, metrics, newest, pack, run_config

pytestmark = pytest.mark.slow


def started(config: Config, *launcher: str, **how) -> subprocess.Popen:
    return subprocess.Popen(
        [*launcher, "--config", write_config(config), "--device", "cpu"],
        env=environment(),
        cwd=ROOT,
        start_new_session=True,
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **how},
    )


def of_run(config: Config) -> list[psutil.Process]:
    """All processes whose command names this run, and what they have started."""
    name = str(Path(config.output).with_suffix(".yaml"))
    found = set()
    for process in psutil.process_iter():
        try:
            if name in process.cmdline():
                found |= {process, *process.children(recursive=True)}
        except psutil.Error:
            pass
    return [process for process in found if alive(process)]


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def all_end(config: Config, seconds: float = 40) -> list[psutil.Process]:
    """Those that are still there then."""
    deadline = time.monotonic() + seconds
    while (left := of_run(config)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        process.kill()
    return left


@pytest.mark.parametrize(
    ("launcher", "number"),
    [
        (lambda: TORCHRUN, signal.SIGUSR1),
        (lambda: ["nohup", *TORCHRUN], signal.SIGHUP),
        (deepspeed, signal.SIGTERM),
    ],
    ids=["torchrun USR1", "nohup torchrun HUP", "deepspeed TERM"],
)
def test_when_the_launcher_ends_its_ranks_save_and_end(
    tmp_path: Path, launcher: Callable[[], list[str]], number: int
):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 10**6, data__workers=1, parallel__expert_parallel=2)
    process = started(config, *launcher())
    try:
        wait_for_metrics(config)
        process.send_signal(number)
    finally:
        left = all_end(config)
    assert left == []
    told = process.communicate()[1].decode()
    assert newest(config).name.startswith("step-"), told
    assert clock(newest(config))["samples"] == metrics(config)[-1]["samples"], told
    assert "has died" not in told, told


def test_a_run_outlives_the_shell_that_began_it(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 10**6)
    path = write_config(config)
    script = f"nohup {sys.executable} {TRAIN} --config {path} --device cpu >/dev/null 2>&1 &"
    subprocess.run(["bash", "-c", script], env=environment(), cwd=ROOT, check=True)
    wait_for_metrics(config)
    trainer = next(one for one in of_run(config) if one.cmdline()[1] == TRAIN)
    trainer.send_signal(signal.SIGHUP)  # nohup has it ignored
    before = metrics(config)[-1]["step"]
    time.sleep(2)
    assert metrics(config)[-1]["step"] > before
    trainer.terminate()
    assert all_end(config) == []
    assert clock(newest(config))["samples"] == metrics(config)[-1]["samples"]


def test_a_closed_terminal_is_a_stop(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 10**6, data__workers=1)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        arguments = [sys.executable, TRAIN, "--config", write_config(config), "--device", "cpu"]
        os.execve(sys.executable, arguments, environment())
    os.set_blocking(terminal, False)
    wait_for_metrics(config)
    os.close(terminal)  # the kernel sends SIGHUP, and every later line meets an error
    assert all_end(config) == []
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 85
    assert clock(newest(config))["samples"] == metrics(config)[-1]["samples"]


def stuck_readers(rank: int) -> None:
    """As on a file server that hangs: from the fourth step on no sample comes."""
    from diffmoe.data import stream

    seeded = stream.keyed_generator

    def stuck(seed, purpose, clock, lane):
        if clock == 3 * 8:
            time.sleep(1000)
        return seeded(seed, purpose, clock, lane)

    stream.keyed_generator = stuck


def test_a_second_ctrl_c_leaves_no_process_behind(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 10**6, data__workers=2)
    with ranks_of(config, 1, stuck_readers) as ranks:
        while len(metrics(config) if (tmp_path / "run/metrics.jsonl").exists() else []) < 3:
            time.sleep(0.1)
        trainer = psutil.Process(ranks.processes[0].pid)
        readers = trainer.children(recursive=True)
        assert len(readers) == 2
        trainer.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert trainer.status() != psutil.STATUS_ZOMBIE  # the step cannot end
        trainer.send_signal(signal.SIGINT)
        assert ranks.wait(10) == [130], ranks.told()
        _, left = psutil.wait_procs(readers, timeout=8)
    for reader in left:
        reader.kill()
    assert left == []
