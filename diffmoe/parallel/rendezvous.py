"""How ranks find each other: the store at MASTER_ADDR:MASTER_PORT, and who has come there."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from diffmoe.errors import UserError
from diffmoe.parallel.agree import ranks_named

JOIN = 300.0  # seconds for all ranks to start
REACH = 50.0  # for the address of rank 0 to be known and to answer, even with a refusal
ANSWER = 30.0  # for the store to answer, where something listens
TELL = 15.0  # before it is told whom a rank waits for
_WAY_OUT = (
    "All ranks need the same MASTER_ADDR and MASTER_PORT: the address of rank 0's machine, and a "
    "free port there that no firewall closes"
)


# Of a process without a launcher; DeepSpeed reads them.
_SINGLE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
_alone = False  # whether `meet` has set them
_meetings = 0  # in this process; a second run needs keys of its own in the launcher's store


class Rank(NamedTuple):
    """This process among those that have joined."""

    store: dist.Store
    rank: int
    world: int


def meet() -> Rank:
    """Wait until all ranks of the launcher are there; without one, a single process is all.

    Raises UserError naming the address, and what is wrong with it or who has not come.
    """
    global _alone, _meetings
    _meetings += 1
    if "RANK" not in os.environ:
        _alone = True
        os.environ |= _SINGLE
        return Rank(dist.HashStore(), 0, 1)
    rank, world, port = _number("RANK"), _number("WORLD_SIZE"), _number("MASTER_PORT")
    address = _variable("MASTER_ADDR")
    if not 0 <= rank < world or not 0 < port < 1 << 16:
        raise UserError(
            f"RANK={rank}, WORLD_SIZE={world}, MASTER_PORT={port}: a rank is one of 0..WORLD_SIZE-1"
            " and a port one of 1..65535"
        )
    # torchrun's own process holds the store for its ranks.
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    _reach(address, port, rank, holds)
    store = _open(address, port, rank, world, holds)
    # The agent's store outlives ranks that torchrun starts again.
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"start-{start}-{_meetings}", store)
    try:
        _gather(store, rank, world, f"{address}:{port}")
    except dist.DistError as error:
        raise UserError(
            f"rank 0, which holds the ranks' store at {address}:{port}, has died ({error})"
        ) from None
    return Rank(store, rank, world)


def part() -> None:
    """After the run: what `meet` set for a single process is no launcher's, and goes."""
    global _alone
    if _alone:
        _alone = False
        for name in _SINGLE:
            del os.environ[name]


def _reach(address: str, port: int, rank: int, holds: bool) -> None:
    """Until something answers there, or, for the store's holder, until the address is known.

    Raises UserError after REACH, or after JOIN where the connection is refused.
    """
    began, told = time.monotonic(), False
    while True:
        try:
            if holds:
                socket.getaddrinfo(address, port)
            else:
                socket.create_connection((address, port), timeout=5).close()
            return
        except OSError as error:
            waited = time.monotonic() - began
            # What refuses is a machine on which rank 0 may still be starting.
            patience = JOIN if isinstance(error, ConnectionRefusedError) else REACH
            problem = (
                f"rank {rank} on {socket.gethostname()} cannot reach rank 0 at "
                f"{address}:{port}: {error.strerror or error}"
            )
        if waited > patience:
            raise UserError(f"{problem}. {_WAY_OUT}")
        if waited > min(TELL, patience / 2) and not told:
            _say(f"{problem}. Retrying for another {patience - waited:.0f} s. {_WAY_OUT}")
            told = True
        time.sleep(0.2)


def _open(address: str, port: int, rank: int, world: int, holds: bool) -> dist.Store:
    """The store, as its holder or as a client.

    torch waits for ever for an answer of what is no store, so it is asked in a thread.
    """
    opened: list[dist.Store | Exception] = []

    def connect() -> None:
        try:
            store = dist.TCPStore(
                address,
                port,
                world,
                is_master=holds,
                timeout=timedelta(seconds=ANSWER),
                wait_for_workers=False,
                multi_tenant=True,
            )
            opened.append(store)
        except Exception as error:
            opened.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(ANSWER)
    if opened and isinstance(opened[0], dist.Store):
        return opened[0]
    where = f"{address}:{port}"
    reason = str(opened[0]).splitlines()[0] if opened else f"no answer in {ANSWER:g} s"
    if "failed to listen" in reason:
        raise UserError(
            f"rank 0 on {socket.gethostname()} cannot listen at {where}: another process does "
            f"({reason}); set another MASTER_PORT (slurm/: DIFFMOE_PORT, deepspeed: --master_port)"
        )
    if holds:
        raise UserError(
            f"rank 0 on {socket.gethostname()} cannot reach itself at {where} ({reason}); is "
            f"MASTER_ADDR the address of this machine? {_WAY_OUT}"
        )
    raise UserError(
        f"rank {rank} on {socket.gethostname()}: what answers at {where} is not rank 0 of this "
        f"run ({reason}). {_WAY_OUT}"
    )


def _gather(store: dist.Store, rank: int, world: int, where: str) -> None:
    """Until all have come; rank 0 looks who they are, and tells the others."""
    if store.add(f"here/{rank}", 1) > 1:
        raise UserError(
            f"two processes at {where} have RANK={rank}; give each a number of its own, and each "
            "run a MASTER_PORT of its own"
        )
    store.set(f"world/{rank}", str(world))
    if rank == 0:
        problem = _look(store, world, where)
        store.set("all here", json.dumps(problem))
    else:
        _wait(lambda: store.check(["all here"]), lambda: "rank 0 to see all ranks", where)
        problem = json.loads(store.get("all here"))
    if problem is None:
        return
    # The store goes with rank 0: the others must have heard.
    heard, deadline = store.add("heard", 1), time.monotonic() + 3
    while rank == 0 and heard < world and time.monotonic() < deadline:
        time.sleep(0.05)
        heard = store.add("heard", 0)
    raise UserError(problem)


def _look(store: dist.Store, world: int, where: str) -> str | None:
    """Rank 0 waits for all and looks who they are. Returns what is wrong with them."""
    missing = set(range(world))

    def all_here() -> bool:
        for other in sorted(missing):
            if not store.check([f"world/{other}"]):
                return False  # the rest is looked at when this one has come
            missing.discard(other)
        return True

    def who() -> str:
        late = [rank for rank in sorted(missing) if not store.check([f"world/{rank}"])]
        return f"{ranks_named(late)} of {world}"

    try:
        _wait(all_here, who, where)
    except UserError as error:
        return str(error)
    for rank in range(world):
        theirs = int(store.get(f"world/{rank}"))
        if theirs != world:
            return (
                f"rank {rank} was started with WORLD_SIZE={theirs}, rank 0 with {world}, both at "
                f"{where}; start all ranks by the same command"
            )
    return None


def _wait(done: Callable[[], bool], who: Callable[[], str], where: str) -> None:
    began, told = time.monotonic(), False
    while not done():
        waited = time.monotonic() - began
        if waited > JOIN:
            raise UserError(f"waited {JOIN:g} s at {where} for {who()}. {_WAY_OUT}")
        if waited > TELL and not told:
            _say(f"waiting at {where} for {who()}; {JOIN - waited:.0f} s more. {_WAY_OUT}")
            told = True
        time.sleep(0.05 if waited < 3 else 0.5)


def _variable(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise UserError(
            f"RANK={os.environ['RANK']} is set, but {name} is not: a launcher sets RANK, "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT; unset RANK to start a single process"
        )
    return value


def _number(name: str) -> int:
    with suppress(ValueError):
        return int(_variable(name))
    raise UserError(f"{name}={os.environ[name]} is not a number")


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
