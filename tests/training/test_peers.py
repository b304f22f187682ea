"""A rank that dies ends the others in bounded time, with an error that names it."""

import os
import signal
from pathlib import Path

import pytest

from tests.training.commands import wait_for_metrics
from tests.training.processes import ranks_of
from tests.training.runs import pack, run_config

WORLD = 3


def impatient(rank: int) -> None:
    from diffmoe.training import peers

    peers.INTERVAL, peers.SILENCE, peers.GRACE = 0.3, 6.0, 6.0


@pytest.mark.parametrize(
    ("rank", "number", "said"),
    [
        (1, signal.SIGKILL, "rank 1 has died; what broke here:"),
        # The store goes with it.
        (0, signal.SIGKILL, "rank 0, which holds the ranks' store, has died"),
        # As a machine that hangs or vanishes: no connection is closed.
        (1, signal.SIGSTOP, "rank 1 has died: no sign of life for 6 s"),
    ],
    ids=["killed", "first killed", "stopped"],
)
def test_the_others_end_and_name_it(tmp_path: Path, rank: int, number: int, said: str):
    pack(tmp_path / "data")
    config = run_config(
        tmp_path, 10**6, data__lanes=3, training__batch_size=9, logging__log_samples=9
    )
    with ranks_of(config, WORLD, impatient) as ranks:
        wait_for_metrics(config)
        os.kill(ranks.processes[rank].pid, number)
        others = [r for r in range(WORLD) if r != rank]
        for other in others:
            ranks.processes[other].join(60)
        codes = [ranks.processes[other].exitcode for other in others]
    assert codes == [1, 1], ranks.told()
    assert said in ranks.told()
