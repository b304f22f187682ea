"""One run at a time in an output: a file in its folder names the run, and a heartbeat keeps it.

`lease-N.json` says who holds the folder; its time of change is the heartbeat. A takeover creates
lease-(N+1).json, which any file system, NFS too, lets only one process do, and removes the old one:
a holder that was suspended meanwhile misses it before it writes again. There are no hard links or
file locks, and clocks of different machines are never compared. Readers need no lease.
"""

import contextlib
import errno
import json
import os
import random
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from diffmoe.errors import UserError
from diffmoe.files import read_bytes
from diffmoe.parallel.agree import from_first_rank

BEAT = 5.0  # seconds between two heartbeats
STALE = 120.0  # without any, before the holder counts as dead
_FILE = re.compile(r"lease-([1-9][0-9]*)\.json")


def _now() -> float:
    """Seconds of a clock that also runs while the machine sleeps, where there is one."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class Holder(NamedTuple):
    """What a lease says of the process that holds it.

    machine, process: where and when it was started, so that a later process of the same pid is not
    taken for it. job, restart: SLURM_JOB_ID, and how often that job had been requeued.
    """

    host: str
    pid: int
    machine: str
    process: str
    job: str
    restart: int
    since: str

    @classmethod
    def this_process(cls) -> "Holder":
        return cls(
            socket.gethostname(),
            os.getpid(),
            _machine(),
            _started(os.getpid()) or "",
            os.environ.get("SLURM_JOB_ID", ""),
            int(os.environ.get("SLURM_RESTART_COUNT", 0)),
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, started {self.since}"

    def ended(self, me: "Holder") -> str | None:
        """How `me`, this process, knows that the holder has ended; None if it does not."""
        if self.job and self.job == me.job and self.restart < me.restart:
            return "this is the same Slurm job, requeued"
        started = _started(self.pid) if self.machine == me.machine else self.process
        if started is None or (started and self.process and started != self.process):
            return "that process has ended"
        return None


class Lease:
    """Of a run's folder, held from `hold` on. On other ranks than the first nothing is held."""

    def __init__(self, output: Path, active: bool = True) -> None:
        """Waits until it is known whether another run holds the folder. Raises UserError if so."""
        self.output, self.active, self._lost = output, active, False
        if not active:
            return
        self._created = not output.exists()
        output.mkdir(parents=True, exist_ok=True)
        self.path = self._take()
        self._confirmed = _now()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        """Whether another run holds the folder now. Checked only if this process was stopped."""
        if self.active and not self._lost and _now() - self._confirmed > STALE / 4:
            with contextlib.suppress(OSError):
                self._confirm()
        return self._lost

    def check(self) -> None:
        """To be called before writing into the folder. Raises UserError if the lease is lost."""
        if self.lost:
            raise UserError(lost_message(self.output))

    def release(self) -> None:
        if not self.active:
            return
        self._closing.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._confirm()  # never remove another run's
            if not self._lost:
                self.path.unlink()
                if self._created:
                    self.output.rmdir()  # unless something was written there
        os.close(self._file)

    def _take(self) -> Path:
        me = Holder.this_process()
        while True:
            found = _leases(self.output)
            ended = _wait_for_the_end(found[-1], me) if found else None
            if found and ended is None:
                continue  # released meanwhile
            number = _number(found[-1]) + 1 if found else 1
            path = self.output / f"lease-{number}.json"
            try:
                self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:  # another process was faster: look at that one
                continue
            os.write(self._file, json.dumps(me._asdict(), indent=1).encode())
            os.fsync(self._file)
            if _leases(self.output) == [*found, path]:
                break
            # Between our look and our file the folder changed hands.
            os.close(self._file)
            path.unlink()
            time.sleep(random.uniform(0.1, 1))
        if found:
            print(f"taking over {self.output}: {ended}", file=sys.stderr, flush=True)
        for old in found:
            old.unlink(missing_ok=True)
        return path

    def _beat(self) -> None:
        while not self._closing.wait(BEAT):
            with contextlib.suppress(OSError):  # a disk that is away for a while
                self._confirm()

    def _confirm(self) -> None:
        """Send a heartbeat, and check that the file is still ours."""
        began = _now()
        try:
            # By the open file, not by its name: NFS then asks the server, not its cache.
            os.utime(self._file)
            if not os.path.samestat(os.stat(self.path), os.fstat(self._file)):
                self._lost = True
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):
                raise
            self._lost = True
        self._confirmed = began


@contextlib.contextmanager
def hold(output: Path) -> Iterator[Lease]:
    """The lease of a run's folder, made if need be: the first rank takes it.

    Raises UserError, on every rank, if another run holds it or the folder cannot be written.
    """
    problem, lease = None, Lease(output, active=False)
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            lease = Lease(output)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", error)
            problem = f"output={output} cannot be written: {reason}; choose another output"
        except UserError as error:
            problem = str(error)
    problem = from_first_rank(problem)
    if problem is not None:
        raise UserError(problem)
    try:
        yield lease
    finally:
        lease.release()


def lost_message(output: Path) -> str:
    """The error of a run that has lost its lease, on any rank."""
    found = _leases(output)
    by = (
        f"{_read(found[-1]) or 'another run'} has taken it over"
        if found
        else "its lease was removed"
    )
    return (
        f"output={output} is no longer held by this run: {by} while this one gave no sign of life, "
        "as when it is suspended; it ends without writing anything more"
    )


def _wait_for_the_end(path: Path, me: Holder) -> str | None:
    """How the holder is known to have ended; None if it let go meanwhile.

    Raises UserError, which names the holder, once it gives a sign of life.
    """
    holder = _read(path)
    first, began, told = _beats(path), time.monotonic(), False
    while (waited := time.monotonic() - began) < STALE:
        ended = holder and holder.ended(me)  # a large process takes a while to die
        if ended:
            return f"it was held by {holder}, and {ended}"
        beats = _beats(path)
        if beats is None:
            return None
        if beats != first:
            raise UserError(
                f"output={path.parent} is in use by {_read(path) or 'another run'}; "
                "end that run first, or choose another output"
            )
        if waited > 2 * BEAT and not told:
            told = True
            print(
                f"{path.parent} is held by {holder or 'another run'}, which may have died: waiting "
                f"until it has shown no sign of life for {STALE:g} s",
                file=sys.stderr,
                flush=True,
            )
        time.sleep(BEAT / 10)
    return f"{holder or 'another run'} gave no sign of life for {STALE:g} s"


def _leases(output: Path) -> list[Path]:
    """Oldest first; the last one counts."""
    try:
        found = [output / name for name in os.listdir(output) if _FILE.fullmatch(name)]
    except FileNotFoundError:
        return []
    return sorted(found, key=_number)


def _number(path: Path) -> int:
    match = _FILE.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _beats(path: Path) -> int | None:
    """The time of the last heartbeat, only to be compared with an earlier reading."""
    try:
        with open(path, "rb") as file:  # NFS asks the server when a file is opened
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _read(path: Path) -> Holder | None:
    """None if it cannot be read, or not yet."""
    try:
        values = json.loads(read_bytes(path))
        kinds = Holder.__annotations__
        if all(isinstance(values[name], kind) for name, kind in kinds.items()):
            return Holder(*(values[name] for name in kinds))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return None


def _machine() -> str:
    """Where processes see each other by their numbers: this boot, and this space of numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return socket.gethostname()


def _started(pid: int) -> str | None:
    """When a process of this machine started, in ticks; None if it has ended."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass  # another user's
    try:
        # The fields behind the name, which may hold anything: the state first.
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:  # not Linux, or hidden from us
        return ""
    return None if state in (b"Z", b"X") else fields[18].decode()
