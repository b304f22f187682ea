"""Ranks watch each other: if one dies or hangs, the others exit soon and report which one it was.

Every rank counts its signs of life in the store by which the ranks join, and watches the next
rank's, so the store's load grows with the number of ranks only. A peer's death breaks gloo's
connections at once; NCCL, or a machine that vanished without closing them, would leave the others
in a collective. A rank whose threads live while its work stands still is found by a roll call.

Two threads of every rank see to it: one talks to the store, and may wait for it in vain; the other
has a clock and nothing else.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist

from diffmoe.parallel import rendezvous
from diffmoe.parallel.backend import choose_backend
from diffmoe.process import launcher
from diffmoe.process.exit import end_process
from diffmoe.training import roll_call
from diffmoe.training.progress import LONG, Progress
from diffmoe.training.roll_call import State

INTERVAL = 1.0  # seconds between two heartbeats
SILENCE = 60.0  # without any, before a rank counts as dead
GAP = 5.0  # by which a clock is late, before its process counts as having been stopped
ROLL = 10.0  # for all ranks to answer a roll call
GRACE = 15.0  # for the others to end by themselves, once some rank has failed
# Of collectives: hangs are found here, by clocks that know when they were stopped.
COLLECTIVES = timedelta(days=7)
_LEFT = 1 << 40  # added to the count of a rank that ends in order

# As the process group, one a process.
_joined: "Watchdog | None" = None


class Watchdog:
    """Watches in threads, from the joining of the ranks until `close`."""

    def __init__(
        self, store: dist.Store, rank: int, world: int, timeout_seconds: float | None = None
    ) -> None:
        self.store, self.rank, self.world = store, rank, world
        self.progress = Progress(timeout_seconds)
        self._closing = threading.Event()
        self._failing_since: float | None = None  # what breaks later breaks for that
        self._answered = self._excused = time.monotonic()  # by the store; from all silence
        self._stopped_for: float | None = None  # this process; to be told to the others
        self._unwatched_since: float | None = None  # the launcher has gone, and the store with it
        self._seen = {"news": 0, "roll": 0, "woken": 0}
        faulthandler.register(signal.SIGUSR2, all_threads=True)  # `kill -USR2` shows the stacks
        store.set(f"process/{rank}", json.dumps(_process(os.getpid())))
        # Its own connection: a blocking call of the main thread must not delay it.
        own = store.clone()  # type: ignore[attr-defined]  # every store of torchrun has it
        self._threads = [
            threading.Thread(target=self._watch, args=(own,), daemon=True),
            threading.Thread(target=self._tick, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Before the run's orderly end; every rank must call it before any leaves."""
        dist.barrier()  # watched to the end
        self._closing.set()
        self._threads[0].join()
        with contextlib.suppress(RuntimeError):  # it may have been the launcher's, which has gone
            self.store.add("closed", 1)
            if self.rank == 0:  # it may hold the store, which the others' threads still ask
                self._wait_for("closed", self.world, GRACE)

    def _tick(self) -> None:
        """The clock: was this process stopped, does the store answer?"""
        last = time.monotonic()
        while not self._closing.wait(INTERVAL):
            now = time.monotonic()
            late, last = now - last - INTERVAL, now
            if late > GAP:
                self._excuse()
                self._stopped_for = late
            if self._unwatched_since:
                if now - self._unwatched_since > LONG:
                    end_process(1)
            elif now - max(self._answered, self._excused) > SILENCE and not self._failing_since:
                _say(
                    f"error: rank 0, which holds the ranks' store, has died: no answer for "
                    f"{SILENCE:g} s"
                )
                end_process(1)

    def _watch(self, store: dist.Store) -> None:
        watched, last, since = (self.rank + 1) % self.world, 0, time.monotonic()
        while not self._closing.wait(INTERVAL):
            try:
                beats = self._beat(store, watched)
                self._hear(store)
                if self.progress.overdue and not self._failing_since:
                    self._call_roll(store)
            except RuntimeError:
                if launcher.lost_store():
                    self._unwatched_since = time.monotonic()
                    return  # the loop saves and ends without it
                self._miss_the_store()
                end_process(1)
            now = time.monotonic()
            if self._failing_since and now - self._failing_since > GRACE:
                end_process(1)  # this rank hangs in a collective
            if beats != last:
                last, since = beats, now
            elif now - max(since, self._excused) > SILENCE:
                self._show_stacks_of(store, watched)
                message = f"rank {watched} has died: no sign of life for {SILENCE:g} s"
                with contextlib.suppress(RuntimeError):
                    self._fail(store, f"error: {message}")
                end_process(1)

    def _beat(self, store: dist.Store, watched: int) -> int:
        """Send a heartbeat and what there is to report. Returns the watched rank's count."""
        store.add(f"alive/{self.rank}", 1)
        beats = store.add(f"alive/{watched}", 0)
        if self._stopped_for is not None:
            _say(
                f"rank {self.rank} was stopped for {self._stopped_for:.0f} s; the timeout "
                "of every rank starts anew"
            )
            self._stopped_for = None
            self._seen["woken"] = store.add("woken", 1)
            store.add("news", 1)
        self._answered = time.monotonic()
        return beats

    def _hear(self, store: dist.Store) -> None:
        """Read what others have reported: a failure, a roll call, that they were stopped."""
        if store.add("news", 0) == self._seen["news"]:
            return
        self._seen["news"] = store.add("news", 0)
        if store.add("failures", 0):
            self._failing_since = self._failing_since or time.monotonic()
            if store.check(["verdict"]):
                self._end_by(store, json.loads(store.get("verdict")))
        woken, roll = store.add("woken", 0), store.add("roll", 0)
        if woken > self._seen["woken"]:
            self._seen["woken"] = woken
            self._excuse()
        if roll > self._seen["roll"]:
            self._answer(store, roll)

    def _excuse(self) -> None:
        self._excused = time.monotonic()
        self.progress.excuse()

    def _call_roll(self, store: dist.Store) -> None:
        """No progress here: ask all ranks what they are doing, and decide which one hangs."""
        seconds, roll = self.progress.allowed, store.add("roll", 1)
        first = roll == self._seen["roll"] + 1
        store.add("news", 1)
        states = {self.rank: self._answer(store, roll)}
        if not first:  # another rank was quicker, and judges
            return
        deadline = time.monotonic() + ROLL
        while len(states) < self.world and time.monotonic() < deadline:
            for rank in sorted(set(range(self.world)) - states.keys()):
                if store.check([f"state/{rank}"]):
                    number, *state = json.loads(store.get(f"state/{rank}"))
                    if number >= roll:
                        states[rank] = State(*state)
            self._beat(store, self.rank)
            time.sleep(INTERVAL / 4)
        if self._excused > deadline - ROLL or any(state.excused for state in states.values()):
            return  # some rank was stopped meanwhile, or is busy and will be there
        text = roll_call.verdict(states, self.world, seconds)
        silent = [rank for rank in range(self.world) if rank not in states]
        store.set("verdict", json.dumps({"dumps": len(states)}))
        for rank in silent:
            self._show_stacks_of(store, rank)
        self._fail(store, f"error: {text}")
        self._end_by(store, {"dumps": len(states)})

    def _answer(self, store: dist.Store, roll: int) -> State:
        self._seen["roll"] = roll
        excused = self.progress.long and not self.progress.overdue
        state = roll_call.own_state(self.progress.doing, excused)
        store.set(f"state/{self.rank}", json.dumps([roll, *state]))
        if not excused:  # for as long again, if the judgment is mild
            self.progress.excuse()
        return state

    def _end_by(self, store: dist.Store, judged: dict[str, Any]) -> NoReturn:
        """A rank hangs: print where this one is, and exit once all have."""
        faulthandler.dump_traceback(all_threads=True)
        with contextlib.suppress(RuntimeError):
            store.add("dumps", 1)
            self._wait_for("dumps", judged["dumps"], 5 * INTERVAL, store)
            if self.rank == 0:  # it may hold the store
                time.sleep(INTERVAL)
        end_process(1)

    def _show_stacks_of(self, store: dist.Store, rank: int) -> None:
        """Ask a rank without heartbeats for its stacks: they come even if Python is blocked."""
        with contextlib.suppress(RuntimeError, psutil.Error, OSError):
            if not store.check([f"process/{rank}"]):
                return
            process = json.loads(store.get(f"process/{rank}"))
            if process == _process(process["pid"]):  # on this machine, and the same one
                os.kill(process["pid"], signal.SIGUSR2)
                time.sleep(INTERVAL)

    def _fail(self, store: dist.Store, message: str) -> None:
        """Report the run's failure, unless another rank already has."""
        first = store.add("failures", 1) == 1
        store.add("news", 1)
        if first:
            _say(message)
            store.add("told", 1)

    def leave(self, message: str, code: int, may_be_a_peer: bool) -> NoReturn:
        """See the function of this name."""
        try:
            self.store.add(f"alive/{self.rank}", _LEFT)
            if self.store.add("failures", 1) == 1:
                self.store.add("news", 1)
                dead = self._silent() if may_be_a_peer else []
                named = ", ".join(f"rank {rank}" for rank in dead)
                _say(f"{named} has died. The error here:\n{message}" if dead else message)
                self.store.add("told", 1)
            elif self.store.check(["verdict"]):
                time.sleep(GRACE)  # the watch shows the stacks, and ends this process
            if self.rank == 0:  # it may hold the store: the others must have told, and left
                self._wait_for("failures", self.world, 3)
                self._wait_for("told", 1, 3 + 4 * INTERVAL)
        except RuntimeError:
            if launcher.lost_store():
                _say(message)
            else:
                self._miss_the_store()
        sys.stdout.flush()
        end_process(code)

    def _miss_the_store(self) -> None:
        if self._failing_since is None:
            _say(f"[rank {self.rank}] rank 0, which holds the ranks' store, has died")

    def _wait_for(
        self, key: str, count: int, seconds: float, store: dist.Store | None = None
    ) -> None:
        store = store or self.store
        deadline = time.monotonic() + seconds
        while store.add(key, 0) < count and time.monotonic() < deadline:
            time.sleep(0.05)

    def _silent(self) -> list[int]:
        """Those whose count stands still although they did not leave."""
        ranks = [rank for rank in range(self.world) if rank != self.rank]
        before = [self.store.add(f"alive/{rank}", 0) for rank in ranks]
        time.sleep(3 * INTERVAL if ranks else 0)
        return [
            rank
            for rank, beats in zip(ranks, before, strict=True)
            if self.store.add(f"alive/{rank}", 0) == beats < _LEFT
        ]


def join(device: torch.device, timeout_seconds: float | None = None) -> Watchdog:
    """Make the launcher's process group, or one of a single process; watch from then on.

    device: of this rank. timeout_seconds: of a step, see Progress.
    """
    global _joined
    store, rank, world = rendezvous.meet()
    store.set_timeout(COLLECTIVES)
    backend = choose_backend(device, store, world)
    _joined = Watchdog(store, rank, world, timeout_seconds)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=COLLECTIVES)
    return _joined


def part() -> None:
    """The orderly end of what `join` began; every rank calls it. Another run may join then."""
    global _joined
    if _joined is not None:
        _joined.close()
        _joined = None
    dist.destroy_process_group()
    rendezvous.part()


def part_alone() -> None:
    """After a failure: a single process parts, so that another run can begin in it.

    Of several ranks the process has to end, by `leave`: the others wait for it.
    """
    if _joined is not None and _joined.world == 1:
        part()


def step_begins(number: int) -> None:
    """Report progress to the watchdog."""
    if _joined is not None:
        _joined.progress.step(number)


@contextlib.contextmanager
def busy(doing: str) -> Iterator[None]:
    """Around work that may take long without being a hang."""
    with contextlib.nullcontext() if _joined is None else _joined.progress.busy(doing):
        yield


def leave(message: str, code: int, may_be_a_peer: bool) -> None:
    """Report a run's first failure, once, and exit without waiting for the other ranks.

    What fails on the others after that fails for want of the first one. Returns if the ranks have
    not joined.
    may_be_a_peer: the failure is such as a broken connection gives: look for a rank that died.
    """
    if _joined is not None:
        _joined.leave(message, code, may_be_a_peer)


def _process(pid: int) -> dict[str, Any]:
    """Which process this is: of which machine or container, which number, since when."""
    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    return {
        "host": socket.gethostname() + namespace,
        "pid": pid,
        "since": psutil.Process(pid).create_time(),
    }


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
