"""A rank that dies or hangs ends the others in bounded time, with an error that names it."""

import ctypes
import os
import re
import signal
import time
from pathlib import Path

import pytest

from diffmoe.training import progress
from diffmoe.training.progress import Progress
from diffmoe.training.roll_call import State, not_arrived, verdict
from tests.helpers.processes import wait_for_metrics
from tests.helpers.ranks import Ranks, ranks_of
from tests.helpers.runs import metrics, newest, pack, run_config

pytestmark = pytest.mark.slow

WORLD = 3


def impatient(rank: int) -> None:
    from diffmoe.training import watchdog

    watchdog.INTERVAL, watchdog.SILENCE, watchdog.GRACE, watchdog.ROLL = 0.3, 6.0, 6.0, 2.0


def three_lanes(tmp_path: Path, **changes):
    pack(tmp_path / "data")
    wide = {"data__lanes": 3, "training__batch_size": 9, "logging__log_samples": 9}
    return run_config(tmp_path, 10**6, **{**wide, **changes})


@pytest.mark.parametrize(
    ("rank", "number", "said"),
    [
        (1, signal.SIGKILL, "rank 1 has died. The error here:"),
        # The store goes with it.
        (0, signal.SIGKILL, "rank 0, which holds the ranks' store, has died"),
        # As a machine that hangs or vanishes: no connection is closed.
        (1, signal.SIGSTOP, "rank 1 has died: no sign of life for 6 s"),
        (0, signal.SIGSTOP, "rank 0, which holds the ranks' store, has died: no answer for 6 s"),
    ],
    ids=["killed", "first killed", "stopped", "first stopped"],
)
def test_the_others_end_and_name_it(tmp_path: Path, rank: int, number: int, said: str):
    config = three_lanes(tmp_path)
    with ranks_of(config, WORLD, impatient) as ranks:
        wait_for_metrics(config)
        os.kill(ranks.processes[rank].pid, number)
        others = [r for r in range(WORLD) if r != rank]
        for other in others:
            ranks.processes[other].join(60)
        codes = [ranks.processes[other].exitcode for other in others]
    assert codes == [1, 1], ranks.told()
    assert said in ranks.told()


class Hanging:
    """Rank 1 hangs in its fourth step."""

    def __init__(self, holds_python: bool) -> None:
        self.holds_python = holds_python

    def __call__(self, rank: int) -> None:
        from diffmoe.training.step import TrainingStep

        impatient(rank)
        run = TrainingStep.run

        def hang_in_the_fourth_step(step, *arguments, **options):
            if rank == 1 and step.number == 3:
                # PyDLL keeps the interpreter's lock: no other thread of Python runs meanwhile.
                library = ctypes.PyDLL(None) if self.holds_python else ctypes.CDLL(None)
                mutex = ctypes.create_string_buffer(64)
                library.pthread_mutex_lock(mutex)
                library.pthread_mutex_lock(mutex)  # waits for itself
            return run(step, *arguments, **options)

        TrainingStep.run = hang_in_the_fourth_step


@pytest.mark.parametrize("holds_python", [False, True], ids=["its work", "all of it"])
def test_a_rank_that_hangs_without_dying_is_named_and_all_stacks_are_shown(
    tmp_path: Path, holds_python: bool
):
    config = three_lanes(tmp_path, parallel__timeout_seconds=3.0)
    with ranks_of(config, WORLD, Hanging(holds_python)) as ranks:
        for other in (0, 2):
            ranks.processes[other].join(40)
        codes = ranks.wait(3)
        logs = [log.read_text() for log in ranks.logs]
        told = ranks.told()
    # A launcher ends the one in which no thread of Python runs.
    assert codes == [1, None if holds_python else 1, 1], told
    assert metrics(config)[-1]["step"] == 3
    place = "does not answer\n" if holds_python else f"step 4: {__file__}, line "
    separator = ": " if holds_python else ", "
    assert (
        "error: rank 1 did not arrive: no progress for 3 s (parallel.timeout_seconds)\n"
        f"  rank 1{separator}{place}"
    ) in told
    assert told.count("error: ") == 1, told
    assert "in hang_in_the_fourth_step" in logs[1]
    for log in (logs[0], logs[2]):
        assert "most recent call first" in log
        assert re.search(r'loop\.py", line \d+ in train', log)


def slow_save(rank: int) -> None:
    from diffmoe.checkpoints import lifecycle

    impatient(rank)
    commit = lifecycle.commit

    def slow(*arguments):
        time.sleep(6)
        return commit(*arguments)

    lifecycle.commit = slow


def test_what_may_take_long_is_no_hang(tmp_path: Path):
    pack(tmp_path / "data")
    config = run_config(tmp_path, 3, parallel__timeout_seconds=1.0)
    with ranks_of(config, 2, slow_save) as ranks:
        codes = ranks.wait(40)
    assert codes == [0, 0], ranks.told()
    assert newest(config).name == "step-00000003"


def wakeful(rank: int) -> None:
    from diffmoe.training import watchdog

    watchdog.INTERVAL, watchdog.SILENCE, watchdog.GAP = 0.2, 5.0, 1.0


def test_suspended_and_resumed_the_ranks_do_not_accuse_each_other(tmp_path: Path):
    """Longer than they have patience with a silent rank, and with a step that does not end."""
    config = three_lanes(tmp_path, parallel__timeout_seconds=5.0)
    with ranks_of(config, WORLD, wakeful) as ranks:
        for _ in range(2):
            wait_for_metrics(config)
            send(ranks, signal.SIGSTOP)
            time.sleep(7)
            before = metrics(config)[-1]["step"]
            # As a cluster resumes its nodes: not all at the same moment.
            send(ranks, signal.SIGCONT, pause=0.7)
            deadline = time.monotonic() + 20
            while metrics(config)[-1]["step"] <= before + 3 and time.monotonic() < deadline:
                time.sleep(0.1)
        ranks.processes[0].terminate()
        codes = ranks.wait(20)
    assert codes == [85] * WORLD, ranks.told()
    assert metrics(config)[-1]["step"] > before + 3
    assert "s; the timeout of every rank starts anew" in ranks.told()


def send(ranks: Ranks, number: int, pause: float = 0.0) -> None:
    for process in ranks.processes:
        os.kill(process.pid, number)
        time.sleep(pause)


def test_a_steps_limit_is_derived_from_the_steps_so_far(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    watched = Progress()
    assert (watched.allowed, watched.long) == (1800.0, True)
    watched.step(1)
    assert watched.allowed == 1800.0  # it may compile
    for number, took in enumerate((600.0, 20.0, 30.0, 20.0), start=2):
        now += took
        watched.step(number)
    assert watched.allowed == 20 * 25.0  # the median of the four
    now += 500.0
    assert not watched.overdue
    now += 1.0
    assert watched.overdue
    with watched.busy("evaluating"):
        assert not watched.overdue
        now += 1700.0
        assert not watched.overdue
        now += 101.0
        assert watched.overdue
    assert not watched.overdue  # the rest of the step has its time
    for number in range(6, 60):
        now += 0.5
        watched.step(number)
    assert watched.allowed == 300.0
    assert Progress(7.0).step_limit == 7.0
    assert Progress(7200.0).allowed == 7200.0  # a start may take as long as a step


def state(**collectives: int) -> State:
    return State("step 7", False, "loop.py, line 1, in train", collectives)


@pytest.mark.parametrize(
    ("states", "missing"),
    [
        # 2 waits for 3 in their group, so both are behind in the world's; 3 alone is to blame.
        ([state(world=5, a=3), state(world=5, a=3), state(world=4, b=3), state(world=4, b=2)], [3]),
        ([state(world=5), state(world=4), state(world=4)], [1, 2]),
        ([state(world=5), state(world=5)], []),
    ],
)
def test_who_is_waited_for_and_waits_for_nobody(states: list[State], missing: list[int]):
    assert not_arrived(dict(enumerate(states))) == missing


def test_a_silent_rank_is_named_before_those_that_wait():
    said = verdict({0: state(world=5), 2: state(world=4)}, 3, 300)
    assert said.startswith("rank 1 did not arrive: no progress for 300 s")
    assert "\n  rank 1: does not answer\n" in said
    alone = verdict({0: state(world=5)}, 1, 300)
    assert "\n  rank 0, step 7: loop.py, line 1, in train\n" in alone
