"""From a shard's address to an open file with the right bytes: retries, stalls, checksums, a cache.

A file in place is opened as it is. What comes from a URL is first written to disk, to the cache or
an unnamed temporary file, one byte after another: object stores and pipes are quick that way, and
samples can then be read in any order without holding a shard in memory.
"""

import hashlib
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from webdataset import utils
from webdataset.gopen import Pipe, gopen, rewrite_url

from diffmoe.config import DataConfig
from diffmoe.data.manifest import FILE_NAME, Manifest, Shard, is_url, starts_program
from diffmoe.errors import UserError
from diffmoe.files import open_regular
from diffmoe.process.exit import at_exit
from diffmoe.redaction import redact

ATTEMPTS = 3
BACK_OFF = 1.0  # seconds before the second attempt; four times as long before each next one
_BLOCK = 1 << 20
_commands: set[subprocess.Popen] | None = set()  # that run now; None when the process ends
_commands_lock = threading.RLock()  # a signal may come while its own thread holds it


class Unreadable(Exception):
    """A shard that could not be had; the message says why."""


class Fetch(NamedTuple):
    """How shards are fetched.

    allow_commands: the user of this machine lets addresses start programs.
    cache: a folder that keeps shards from URLs; None keeps none. Several processes may share it.
    cache_gib: the oldest go when it would outgrow this; 0 means no limit.
    stall_seconds: without a byte for so long, an attempt has failed.
    """

    cache: str | None = None
    cache_gib: float = 0.0
    stall_seconds: float = 60.0
    allow_commands: bool = False

    @classmethod
    def of(cls, data: DataConfig) -> "Fetch":
        """As the settings of a run say."""
        return cls(data.cache, data.cache_gib, data.stall_seconds, data.allow_commands)

    def permitted(self, address: str) -> str:
        """The address as this machine's GOPEN_REWRITE has it. Raises UserError where it is refused.

        webdataset's own switch, WDS_SECURE=1, forbids commands whatever allow_commands is.
        """
        if not is_url(address):
            return address
        try:
            address = rewrite_url(address)
        except ValueError as error:
            raise UserError(f"shard {redact(address)}: {redact(str(error))}") from None
        if not starts_program(address):
            return address
        if utils.enforce_security:
            raise UserError(f"shard {redact(address)} starts a program, which WDS_SECURE=1 forbids")
        if not self.allow_commands:
            raise UserError(
                f"shard {redact(address)} would start a program on this machine. If you trust who "
                f"made the data's {FILE_NAME}, allow it: data.allow_commands=true of train.py, "
                "--allow-commands of a tool; else copy the shards here"
            )
        return address


def open_shard(
    address: str,
    shard: Shard,
    fetch: Fetch = Fetch(),  # noqa: B008 (a tuple)
    attempts: int = ATTEMPTS,
    beat: Callable[[], None] = lambda: None,
) -> BinaryIO:
    """Open a shard that has the size and the checksum of its manifest.

    Raises Unreadable; UserError where the address would start a program and may not.
    beat: called whenever there is progress.
    """
    address = fetch.permitted(address)
    for attempt in range(attempts):
        beat()
        try:
            return _open_once(address, shard, fetch, beat)
        except OSError as error:  # and TimeoutError, and Unreadable below
            reason = error.strerror or str(error)
        except (Unreadable, ValueError) as error:  # webdataset's for an unknown scheme
            reason = str(error)
        if attempt + 1 < attempts:
            time.sleep(BACK_OFF * 4**attempt)
    raise Unreadable(f"{reason}; {attempts} attempts" if attempts > 1 else reason)


def check_addresses(directory: str | Path, manifest: Manifest, fetch: Fetch) -> None:
    """Raises UserError where reading the shards would start a program that is not allowed."""
    for shard in manifest.shards:
        fetch.permitted(manifest.address(directory, shard))


class ReadAhead:
    """A shard that another thread opens meanwhile. `result` waits for it, but never forever."""

    def __init__(self, address: str, shard: Shard, fetch: Fetch, attempts: int = ATTEMPTS):
        self._done, self._abandoned = threading.Event(), False
        self._file: BinaryIO | None = None
        self._error: BaseException | None = None
        self._last_beat = time.monotonic()
        self._patience = 2 * fetch.stall_seconds + BACK_OFF * 4**ATTEMPTS
        # A daemon: a file system that hangs must not keep the process from ending.
        threading.Thread(
            target=self._run, args=(address, shard, fetch, attempts), daemon=True
        ).start()

    def result(self) -> BinaryIO:
        """The open shard. Raises Unreadable."""
        while not self._done.wait(min(1.0, self._patience)):
            if time.monotonic() - self._last_beat > self._patience:
                self.close()
                raise Unreadable(f"no progress for {self._patience:.0f} seconds")
        if self._error is not None:
            raise self._error
        return self._file

    def close(self) -> None:
        """Give it up; a file that is or will be open is closed."""
        self._abandoned = True
        if self._done.is_set() and self._file is not None:
            self._file.close()

    def _run(self, address: str, shard: Shard, fetch: Fetch, attempts: int) -> None:
        try:
            self._file = open_shard(address, shard, fetch, attempts, self._beat)
        except BaseException as error:
            self._error = error
        self._done.set()
        if self._abandoned:
            self.close()

    def _beat(self) -> None:
        if self._abandoned:
            raise Unreadable("given up")  # ends a transfer that nobody waits for
        self._last_beat = time.monotonic()


def _open_once(address: str, shard: Shard, fetch: Fetch, beat: Callable[[], None]) -> BinaryIO:
    if not is_url(address):
        return _opened(address, shard, beat)
    cached = Path(fetch.cache) / f"{shard.sha256}.tar" if fetch.cache else None
    if cached is not None:
        cached.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            try:
                file = _opened(cached, shard, beat)
                os.utime(cached)  # the youngest now
                return file
            except Unreadable:
                cached.unlink(missing_ok=True)  # fetched anew below
    folder = cached.parent if cached else None
    file = tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False)  # noqa: SIM115
    try:
        _copy(address, shard, file, fetch.stall_seconds, beat)
        if cached is not None and _make_room(cached.parent, shard.bytes, fetch.cache_gib):
            os.replace(file.name, cached)
    except BaseException:
        file.close()
        raise
    finally:
        Path(file.name).unlink(missing_ok=True)  # the open file lives on
    return file


def _opened(path: str | Path, shard: Shard, beat: Callable[[], None]) -> BinaryIO:
    """Read a file through, which also brings it near, and compare it with the manifest."""
    file = open_regular(path)
    try:
        _compare_sizes(os.fstat(file.fileno()).st_size, shard)
        digest, size = hashlib.sha256(), 0
        buffer = memoryview(bytearray(_BLOCK))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            beat()
        _compare(size, digest.hexdigest(), shard)
    except BaseException:
        file.close()
        raise
    return file


def _copy(
    address: str, shard: Shard, file: BinaryIO, stall_seconds: float, beat: Callable[[], None]
) -> None:
    """Write what comes from a URL into a file, and compare it with the manifest."""
    digest, size = hashlib.sha256(), 0
    with closing(_blocks(address, stall_seconds)) as blocks:
        for block in blocks:
            digest.update(block)
            size += len(block)
            if size > shard.bytes:
                break  # of an endless pipe
            file.write(block)
            beat()
    file.flush()
    _compare(size, digest.hexdigest(), shard)


def _compare_sizes(size: int, shard: Shard) -> None:
    if size != shard.bytes:
        kind = "truncated" if size < shard.bytes else "too long"
        raise Unreadable(f"{kind}: {size} bytes came, {shard.bytes} in the manifest")


def _compare(size: int, sha256: str, shard: Shard) -> None:
    _compare_sizes(size, shard)
    if sha256 != shard.sha256:
        raise Unreadable(
            f"corrupt: sha256 {sha256[:12]}..., {shard.sha256[:12]}... in the manifest"
        )


def _blocks(address: str, stall_seconds: float) -> Iterator[bytes]:
    """The bytes behind a URL. Raises TimeoutError when they stop coming, OSError when it failed."""
    if address.startswith(("http:", "https:")):
        yield from _http(address, stall_seconds)
        return
    if address.startswith("pipe:"):
        process = _start(address[5:])
    else:
        stream = gopen(address)
        if not isinstance(stream, Pipe):  # a scheme that somebody has registered
            yield from iter(lambda: stream.read(_BLOCK), b"")
            return
        process = stream.proc
    ready = select.poll()
    ready.register(process.stdout, select.POLLIN | select.POLLHUP)
    try:
        while True:
            if not ready.poll(stall_seconds * 1000):
                raise TimeoutError(f"no data for {stall_seconds:g} seconds")
            block = os.read(process.stdout.fileno(), _BLOCK)
            if not block:
                break
            yield block
        status = process.wait(stall_seconds)
        if status:
            raise OSError(f"the command that reads it ended with status {status}")
    except subprocess.TimeoutExpired:
        pass  # all the bytes are there, and are compared with the manifest
    finally:
        _end(process)
        process.stdout.close()
        process.wait()
        with _commands_lock:
            if _commands is not None:
                _commands.discard(process)


def _http(address: str, stall_seconds: float) -> Iterator[bytes]:
    """The bytes behind an http URL, read without webdataset's curl: no program is started."""
    parts = urlsplit(address)
    request = Request(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        # Another host that the answer leads to gets no password.
        request.add_unredirected_header("Authorization", "Basic " + b64encode(login).decode())
    try:
        with urlopen(request, timeout=stall_seconds) as answer:
            while block := answer.read1(_BLOCK):
                yield block
    except HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from None


def end_commands() -> None:
    """End the `pipe:` commands that still run and start no more: this process ends."""
    global _commands
    held = _commands_lock.acquire(timeout=2)  # a thread that hangs must not keep the process alive
    running, _commands = _commands or set(), None
    if held:
        _commands_lock.release()
    for process in running:
        _end(process)


def _forget_commands() -> None:
    """In a forked process: those of the parent are not its own."""
    global _commands, _commands_lock
    _commands, _commands_lock = set(), threading.RLock()


at_exit(end_commands)
os.register_at_fork(after_in_child=_forget_commands)


def _start(command: str) -> subprocess.Popen:
    """Run a shell command as webdataset does, but in a session of its own.

    So the whole pipeline can be ended, and Ctrl-C, which lets a run finish its step, spares it.
    """
    with _commands_lock:
        if _commands is None:
            raise Unreadable("this process ends")
        process = subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        _commands.add(process)
    return process


def _end(process: subprocess.Popen) -> None:
    """Kill a command, with its whole group if that is its own."""
    with suppress(ProcessLookupError, PermissionError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _make_room(folder: Path, size: int, limit_gib: float) -> bool:
    """Remove the oldest shards of the cache until `size` bytes fit. False if they never can."""
    limit = limit_gib * 2**30 if limit_gib > 0 else float("inf")
    if size > limit:
        return False
    kept = []
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # other processes tidy up as well
            stat = file.stat()
            if file.suffix == ".tmp" and time.time() - stat.st_mtime > 3600:
                file.unlink()  # left by a process that was killed
            elif file.suffix == ".tar":
                kept.append((stat.st_mtime_ns, stat.st_size, file))
    used = sum(held for _, held, _ in kept)
    for _, held, file in sorted(kept):
        if used + size <= limit:
            break
        file.unlink(missing_ok=True)  # whoever reads it has it open
        used -= held
    return True
