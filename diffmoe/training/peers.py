"""Ranks watch each other: when one dies the others end in bounded time, and its name is told.

Every rank counts its signs of life in the store by which the ranks join, and watches the next
rank's, so the store's load grows with the number of ranks only. A peer's death breaks gloo's
connections at once; NCCL, or a machine that vanished without closing them, would leave the others
in a collective.
"""

import contextlib
import os
import sys
import threading
import time
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

JOIN = 300.0  # seconds for all ranks to start
INTERVAL = 1.0  # between two signs of life
SILENCE = 60.0  # without any, before a rank counts as dead
GRACE = 15.0  # for the others to end by themselves, once some rank has failed
_LEFT = 1 << 40  # added to the count of a rank that ends in order

# As the process group, one a process.
_joined: "Peers | None" = None


class Peers:
    """Watches in a thread, from the joining of the ranks until `close`."""

    def __init__(self, store: dist.Store, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self._closing = threading.Event()
        self._failing_since: float | None = None  # what breaks later breaks for that
        # Its own connection: a blocking call of the main thread must not delay it.
        target = (store.clone(),)
        self._thread = threading.Thread(target=self._watch, args=target, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Before the run's orderly end; every rank must call it before any leaves."""
        self._closing.set()
        self._thread.join()
        dist.barrier()

    def _watch(self, store: dist.Store) -> None:
        watched, last, since = (self.rank + 1) % self.world, 0, time.monotonic()
        while not self._closing.wait(INTERVAL):
            now = time.monotonic()
            try:
                store.add(f"alive/{self.rank}", 1)
                beats, failures = store.add(f"alive/{watched}", 0), store.add("failures", 0)
            except RuntimeError:
                self._miss_the_store()
                os._exit(1)
            if failures:
                self._failing_since = self._failing_since or now
                if now - self._failing_since > GRACE:  # this rank hangs in a collective
                    os._exit(1)
            patience = SILENCE if beats else JOIN
            if beats != last:
                last, since = beats, now
            elif now - since > patience:
                self._accuse(store, f"rank {watched} has died: no sign of life for {patience:g} s")

    def _accuse(self, store: dist.Store, message: str) -> NoReturn:
        with contextlib.suppress(RuntimeError):
            if store.add("failures", 1) == 1:
                _say(message)
                store.add("told", 1)
        os._exit(1)

    def leave(self, message: str, code: int, may_be_a_peer: bool) -> NoReturn:
        """See the function of this name."""
        try:
            self.store.add(f"alive/{self.rank}", _LEFT)
            if self.store.add("failures", 1) == 1:
                dead = self._silent() if may_be_a_peer else []
                named = ", ".join(f"rank {rank}" for rank in dead)
                _say(f"{named} has died; what broke here:\n{message}" if dead else message)
                self.store.add("told", 1)
            if self.rank == 0:  # it may hold the store: the others must have told, and left
                self._wait_for("failures", self.world, 3)
                self._wait_for("told", 1, 3 + 4 * INTERVAL)
        except RuntimeError:
            self._miss_the_store()
        sys.stdout.flush()
        os._exit(code)

    def _miss_the_store(self) -> None:
        if self._failing_since is None:
            _say(f"[rank {self.rank}] rank 0, which holds the ranks' store, has died")

    def _wait_for(self, key: str, count: int, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.store.add(key, 0) < count and time.monotonic() < deadline:
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


def join(backend: str, timeout: timedelta) -> Peers:
    """Make the launcher's process group, or one of a single process; watch from then on."""
    global _joined
    if "RANK" not in os.environ:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        store, rank, world = dist.HashStore(), 0, 1
    else:
        try:
            store, rank, world = next(rendezvous("env://", timeout=timedelta(seconds=JOIN)))
        except dist.DistNetworkError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise dist.DistNetworkError(
                f"rank 0 gave no store at {where} within {JOIN:g} s; has it died? ({error})"
            ) from None
    store.set_timeout(timeout)
    _joined = Peers(store, rank, world)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return _joined


def leave(message: str, code: int, may_be_a_peer: bool) -> None:
    """Tell a run's first failure, once, and end without waiting for the other ranks.

    What fails on the others after that fails for want of the first one. Returns if the ranks have
    not joined.
    may_be_a_peer: the failure is such as a broken connection gives: look for a rank that died.
    """
    if _joined is not None:
        _joined.leave(message, code, may_be_a_peer)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
