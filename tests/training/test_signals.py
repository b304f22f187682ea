"""A signal finishes the step, saves, and ends the run in order; a second Ctrl-C does not wait."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.processes import TRAIN, command, environment, wait_for_metrics, write_config
from tests.helpers.ranks import ranks_of
from tests.helpers.runs import SignalDuringStep, clock, metrics, newest, pack, run_config, train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("number", "rank"), [(signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGUSR1, 1)]
)
def test_a_signal_to_one_rank_stops_all_after_the_step(tmp_path: Path, number: int, rank: int):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 5, parallel__expert_parallel=2)
    stopped = train(config, world=2, prepare=SignalDuringStep(2, number, rank))
    assert stopped == [False, False]
    assert clock(newest(config)) == {"samples": 16, "step": 2, "skipped": 0}
    assert len(list(Path(config.output).glob("step-*"))) == 1
    assert [line["step"] for line in metrics(config)] == [1, 2]
    assert train(config, world=2) == [True, True]
    assert clock(newest(config)) == {"samples": 40, "step": 5, "skipped": 0}
    assert [line["step"] for line in metrics(config)] == [1, 2, 3, 4, 5]


def test_every_rank_exits_with_code_85(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 10**6)
    with ranks_of(config, 2) as ranks:
        wait_for_metrics(config)
        os.kill(ranks.processes[1].pid, signal.SIGUSR1)
        codes = ranks.wait()
    assert codes == [85, 85], ranks.told()
    told = ranks.told()
    assert told.count("saved ") == 1
    reached = clock(newest(config))
    assert told.splitlines()[-1] == (
        f"stopped by SIGUSR1 to rank 1 after step {reached['step']}, {reached['samples']} of "
        "8000000 samples; the same command resumes from there"
    )
    assert clock(newest(config))["samples"] == metrics(config)[-1]["samples"]


def test_a_signal_during_the_last_step_is_an_ordinary_end(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 2)
    assert train(config, prepare=SignalDuringStep(2)) == [True]
    assert clock(newest(config))["step"] == 2


def test_train_py_answers_sigterm_with_a_checkpoint_and_code_85(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 1_000_000, data__workers=1)
    process = subprocess.Popen(
        [sys.executable, TRAIN, "--config", write_config(config), "--device", "cpu"],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_metrics(config)
        process.terminate()
        _, told = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 85, told
    saved = newest(config)
    assert told.count("saved ") == 1
    assert f"saved {saved}" in told
    assert told.splitlines()[-1].startswith("stopped by SIGTERM after step ")
    assert "Traceback" not in told
    assert clock(saved)["samples"] == metrics(config)[-1]["samples"]


def test_a_second_ctrl_c_ends_at_once():
    script = (
        "import os, signal, time\n"
        "from diffmoe.training.signals import StopRequest\n"
        "stop = StopRequest()\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('asked' if stop.asked else 'not asked', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('still here', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "print('too late', flush=True)\n"
    )
    done = command(sys.executable, "-c", script)
    assert done.stdout.split("\n")[:-1] == ["asked", "still here"]
    assert done.returncode == 130
    assert done.stderr.count("the run ends after this step and saves; again, it ends at once") == 1


def test_ctrl_c_while_torch_is_imported_is_acknowledged():
    process = subprocess.Popen(
        [sys.executable, TRAIN, "--config", "mnist", "data.path=nowhere", "--device", "cpu"],
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        maps = Path(f"/proc/{process.pid}/maps")
        deadline = time.monotonic() + 60
        while "libtorch" not in maps.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert told == "stopped before the training began; nothing was changed\n"


@pytest.mark.parametrize("module", ["diffmoe.errors", "diffmoe.process.launcher", "torch"])
def test_ctrl_c_while_a_module_is_imported_is_acknowledged(module: str):
    script = (
        "import os, runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"wanted = ('import', {module!r})\n"
        "sys.addaudithook(lambda event, about: (event, about[:1]) == (wanted[0], wanted[1:])\n"
        "    and os.kill(os.getpid(), signal.SIGINT))\n"
        "sys.argv = ['train.py', '--config', 'mnist', 'data.path=nowhere']\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    done = command(sys.executable, "-c", script)
    assert done.returncode == 130
    assert done.stderr == "stopped before the training began; nothing was changed\n"


def test_ctrl_c_before_the_training_is_acknowledged():
    script = (
        "import os, runpy, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job ignores it
        "import diffmoe.recipes as recipes\n"
        "recipes.load_config = lambda *_: os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.argv = ['train.py', '--config', 'mnist']\n"
        "runpy.run_path('train.py', run_name='__main__')\n"
    )
    done = command(sys.executable, "-c", script)
    assert done.returncode == 130
    assert done.stderr == "stopped before the training began; nothing was changed\n"
