"""Ranks that cannot find each other end with a sentence that names the address."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from diffmoe.errors import UserError
from diffmoe.parallel.rendezvous import meet
from tests.helpers.processes import free_port
from tests.helpers.ranks import _context


class Meeting:
    """Processes that call `meet`, each with an environment of its own; what came of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.processes, self.receivers = folder, [], []

    def start(self, rank: int, world: int, port: int, address: str = "127.0.0.1", **more: str):
        environment = {"RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        environment |= {"MASTER_ADDR": address, "LOCAL_RANK": rank, **more}
        environment = {name: str(value) for name, value in environment.items()}
        receiver, sender = _context.Pipe(duplex=False)
        log = self.folder / f"log-{len(self.processes)}"
        process = _context.Process(target=_meet, args=(environment, log, sender))
        process.start()
        sender.close()
        self.processes.append(process)
        self.receivers.append(receiver)

    def outcome(self, number: int, seconds: float = 20) -> tuple[Any, str]:
        """(rank, world) or what the error said; and what was told meanwhile."""
        assert self.receivers[number].poll(seconds), f"{number} still waits after {seconds} s"
        outcome = self.receivers[number].recv()
        return outcome, (self.folder / f"log-{number}").read_text()


@pytest.fixture
def meeting(tmp_path: Path) -> Iterator[Meeting]:
    meeting = Meeting(tmp_path)
    yield meeting
    for process in meeting.processes:
        process.kill()
        process.join()


def _meet(environment: dict[str, str], log: Path, sender: Any) -> None:
    from diffmoe.parallel import rendezvous

    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    rendezvous.JOIN, rendezvous.REACH, rendezvous.ANSWER, rendezvous.TELL = 6.0, 3.0, 3.0, 1.0
    os.environ |= environment
    try:
        met = meet()
        sender.send((met.rank, met.world))
    except UserError as error:
        sender.send(str(error))
    time.sleep(60)  # rank 0 may hold the store


@contextmanager
def listening() -> Iterator[int]:
    """A port at which something listens that is no store."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.slow
def test_ranks_meet_and_may_come_late(meeting: Meeting):
    port = free_port()
    meeting.start(1, 2, port)
    time.sleep(3)  # longer than an address may take that does not answer at all
    meeting.start(0, 2, port)
    met, told = meeting.outcome(0)
    assert [met, meeting.outcome(1)[0]] == [(1, 2), (0, 2)]
    waited = f"cannot reach rank 0 at 127.0.0.1:{port}: Connection refused. Retrying for another "
    assert waited in told


@pytest.mark.slow
def test_a_wrong_port_is_named_by_those_who_wait(meeting: Meeting):
    port, wrong = free_port(), free_port()
    meeting.start(0, 2, port)
    meeting.start(1, 2, wrong)
    error, told = meeting.outcome(1)
    assert f"cannot reach rank 0 at 127.0.0.1:{wrong}: Connection refused" in error
    assert f"cannot reach rank 0 at 127.0.0.1:{wrong}: Connection refused. Retrying" in told
    error, told = meeting.outcome(0)
    assert error.startswith(f"waited 6 s at 127.0.0.1:{port} for rank 1 of 2. All ranks need")
    assert f"waiting at 127.0.0.1:{port} for rank 1 of 2; " in told


@pytest.mark.slow
def test_a_name_that_is_not_known_ends_it(meeting: Meeting):
    for rank in (0, 1):
        meeting.start(rank, 2, 29876, address="no-such-host.invalid")
        error, _ = meeting.outcome(rank)
        assert f"rank {rank} on " in error
        assert "cannot reach rank 0 at no-such-host.invalid:29876: " in error


@pytest.mark.slow
def test_a_port_in_use_ends_rank_0_at_once_and_others_soon(meeting: Meeting):
    with listening() as port:
        began = time.monotonic()
        meeting.start(0, 2, port)
        error, _ = meeting.outcome(0)
        assert time.monotonic() - began < 3
        assert f"cannot listen at 127.0.0.1:{port}: another process does" in error
        assert "set another MASTER_PORT" in error
        meeting.start(1, 2, port)
        error, _ = meeting.outcome(1)
        assert f"what answers at 127.0.0.1:{port} is not rank 0 of this run" in error


@pytest.mark.slow
def test_ranks_that_were_counted_wrongly_are_named(meeting: Meeting):
    port = free_port()
    meeting.start(0, 2, port)
    meeting.start(1, 3, port)
    expected = (
        f"rank 1 was started with WORLD_SIZE=3, rank 0 with 2, both at 127.0.0.1:{port}; start "
        "all ranks by the same command"
    )
    assert [meeting.outcome(number)[0] for number in (0, 1)] == [expected] * 2
    port = free_port()
    meeting.start(0, 3, port)
    meeting.start(1, 3, port)
    time.sleep(1)
    meeting.start(1, 3, port)
    assert meeting.outcome(4)[0].startswith(f"two processes at 127.0.0.1:{port} have RANK=1;")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "RANK=0 is set, but WORLD_SIZE is not: a launcher sets"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x is not a number"),
        ({"RANK": "2"}, "RANK=2, WORLD_SIZE=2, MASTER_PORT=29500: a rank is one of"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: a rank is one of"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not"),
    ],
)
def test_what_a_launcher_sets_is_checked(monkeypatch, environment: dict[str, str], said: str):
    whole = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    if environment == {"RANK": "0"}:
        whole = {}
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**whole, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        meet()
