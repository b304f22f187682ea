"""From a shard's address to an open, verified file: retries, stalls, checksums, a cache.

Local files are opened in place. A URL is first copied to disk sequentially, into the cache or an
unnamed temporary file: object stores and pipes are fast that way, and samples can then be read in
any order without holding the shard in memory.
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
from collections.abc import Callable, Generator, Iterator
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
BACK_OFF = 1.0  # seconds before the second attempt, four times longer before each further one
_BLOCK = 1 << 20
_commands: set[subprocess.Popen] | None = set()  # that are running; None once the process ends
_commands_lock = threading.RLock()  # reentrant: a signal may arrive while its thread holds it


class Unreadable(Exception):
    """A shard that could not be read; the message says why."""


class Fetch(NamedTuple):
    """How shards are fetched.

    cache: folder that keeps shards from URLs; None: no cache. Several processes may share it.
    cache_gib: size limit; the oldest shards are removed. 0: no limit.
    stall_seconds: an attempt fails after so long without a byte.
    allow_commands: whether addresses may start programs on this machine.
    """

    cache: str | None = None
    cache_gib: float = 0.0
    stall_seconds: float = 60.0
    allow_commands: bool = False

    @classmethod
    def of(cls, data: DataConfig) -> "Fetch":
        """From the settings of a run."""
        return cls(data.cache, data.cache_gib, data.stall_seconds, data.allow_commands)

    def permitted(self, address: str) -> str:
        """The address, rewritten by GOPEN_REWRITE. Raises UserError if it must not be opened.

        webdataset's WDS_SECURE=1 forbids commands whatever allow_commands is.
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
                f"shard {redact(address)} would start a program on this machine. If you trust the "
                f"author of the data's {FILE_NAME}, allow it with data.allow_commands=true "
                "(train.py) or --allow-commands (tools); else copy the shards here"
            )
        return address


def open_shard(
    address: str,
    shard: Shard,
    fetch: Fetch = Fetch(),  # noqa: B008 (a tuple)
    attempts: int = ATTEMPTS,
    beat: Callable[[], None] = lambda: None,
) -> BinaryIO:
    """Open a shard and verify its size and checksum.

    beat: called whenever there is progress.
    Raises Unreadable; UserError if the address would start a program and must not.
    """
    address = fetch.permitted(address)
    for attempt in range(attempts):
        beat()
        try:
            return _open_once(address, shard, fetch, beat)
        except OSError as error:  # and TimeoutError, and Unreadable below
            reason = error.strerror or str(error)
        except (Unreadable, ValueError) as error:  # from webdataset, for an unknown scheme
            reason = str(error)
        if attempt + 1 < attempts:
            time.sleep(BACK_OFF * 4**attempt)
    raise Unreadable(f"{reason}; {attempts} attempts" if attempts > 1 else reason)


def check_addresses(directory: str | Path, manifest: Manifest, fetch: Fetch) -> None:
    """Raise UserError if reading a shard would start a program that is not allowed."""
    for shard in manifest.shards:
        fetch.permitted(manifest.address(directory, shard))


class ReadAhead:
    """A shard that a thread opens in the background. `result` waits for it, but not forever."""

    def __init__(self, address: str, shard: Shard, fetch: Fetch, attempts: int = ATTEMPTS):
        self._done, self._abandoned = threading.Event(), False
        self._file: BinaryIO | None = None
        self._error: BaseException | None = None
        self._last_beat = time.monotonic()
        self._patience = 2 * fetch.stall_seconds + BACK_OFF * 4**ATTEMPTS
        # A daemon thread, so that a hanging file system does not keep the process alive.
        threading.Thread(
            target=self._run, args=(address, shard, fetch, attempts), daemon=True
        ).start()

    def result(self) -> BinaryIO:
        """The open shard. Raises Unreadable or UserError, as `open_shard` does."""
        while not self._done.wait(min(1.0, self._patience)):
            if time.monotonic() - self._last_beat > self._patience:
                self.close()
                raise Unreadable(f"no progress for {self._patience:.0f} seconds")
        if self._error is not None:
            raise self._error
        assert self._file is not None
        return self._file

    def close(self) -> None:
        """Give up; a file that is or will be open is closed."""
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
            raise Unreadable("given up")  # ends the transfer
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
                os.utime(cached)  # counts as the newest
                return file
            except Unreadable:
                cached.unlink(missing_ok=True)  # fetched again below
    number, name = tempfile.mkstemp(dir=cached.parent if cached else None, suffix=".tmp")
    file = open(number, "w+b")  # noqa: SIM115 (returned open)
    try:
        _copy(address, shard, file, fetch.stall_seconds, beat)
        if cached is not None and _make_room(cached.parent, shard.bytes, fetch.cache_gib):
            os.replace(name, cached)
    except BaseException:
        file.close()
        raise
    finally:
        Path(name).unlink(missing_ok=True)  # the open file stays readable
    return file


def _opened(path: str | Path, shard: Shard, beat: Callable[[], None]) -> BinaryIO:
    """Open a file and compare its size and checksum with the manifest."""
    file = open_regular(path)
    try:
        _compare_sizes(os.fstat(file.fileno()).st_size, shard)
        digest, size = hashlib.sha256(), 0
        buffer = memoryview(bytearray(_BLOCK))
        # The protocol of binary files lacks readinto.
        while count := file.readinto(buffer):  # type: ignore[attr-defined]
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
    """Copy a URL into a file and compare size and checksum with the manifest."""
    digest, size = hashlib.sha256(), 0
    with closing(_blocks(address, stall_seconds)) as blocks:
        for block in blocks:
            digest.update(block)
            size += len(block)
            if size > shard.bytes:
                break  # the pipe may be endless
            file.write(block)
            beat()
    file.flush()
    _compare(size, digest.hexdigest(), shard)


def _compare_sizes(size: int, shard: Shard) -> None:
    if size != shard.bytes:
        kind = "truncated" if size < shard.bytes else "too long"
        raise Unreadable(f"{kind}: {size} bytes read, {shard.bytes} in the manifest")


def _compare(size: int, sha256: str, shard: Shard) -> None:
    _compare_sizes(size, shard)
    if sha256 != shard.sha256:
        raise Unreadable(
            f"corrupt: sha256 {sha256[:12]}..., {shard.sha256[:12]}... in the manifest"
        )


def _blocks(address: str, stall_seconds: float) -> Generator[bytes, None, None]:
    """The bytes of a URL. Raises TimeoutError if they stop arriving, OSError if reading fails."""
    if address.startswith(("http:", "https:")):
        yield from _http(address, stall_seconds)
        return
    if address.startswith("pipe:"):
        process = _start(address[5:])
    else:
        stream = gopen(address)
        if not isinstance(stream, Pipe):  # a scheme registered with webdataset
            yield from iter(lambda: stream.read(_BLOCK), b"")
            return
        process = stream.proc
    output = process.stdout
    assert output is not None
    ready = select.poll()
    ready.register(output, select.POLLIN | select.POLLHUP)
    try:
        while True:
            if not ready.poll(stall_seconds * 1000):
                raise TimeoutError(f"no data for {stall_seconds:g} seconds")
            block = os.read(output.fileno(), _BLOCK)
            if not block:
                break
            yield block
        status = process.wait(stall_seconds)
        if status:
            raise OSError(f"its command exited with status {status}")
    except subprocess.TimeoutExpired:
        pass  # all bytes have arrived and are compared with the manifest
    finally:
        _end(process)
        output.close()
        process.wait()
        with _commands_lock:
            if _commands is not None:
                _commands.discard(process)


def _http(address: str, stall_seconds: float) -> Iterator[bytes]:
    """The bytes of an http URL, without webdataset's curl: no program is started."""
    parts = urlsplit(address)
    request = Request(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        # Not sent to another host after a redirect.
        request.add_unredirected_header("Authorization", "Basic " + b64encode(login).decode())
    try:
        with urlopen(request, timeout=stall_seconds) as answer:
            while block := answer.read1(_BLOCK):
                yield block
    except HTTPException as error:
        raise OSError(f"{type(error).__name__}: {error}") from None


def end_commands() -> None:
    """Kill the commands of `pipe:` that are running and start no more, because the process ends."""
    global _commands
    held = _commands_lock.acquire(timeout=2)  # a hanging thread must not block the exit
    running, _commands = _commands or set(), None
    if held:
        _commands_lock.release()
    for process in running:
        _end(process)


def _forget_commands() -> None:
    """In a forked process, whose parent's commands are not its own."""
    global _commands, _commands_lock
    _commands, _commands_lock = set(), threading.RLock()


at_exit(end_commands)
os.register_at_fork(after_in_child=_forget_commands)


def _start(command: str) -> subprocess.Popen:
    """Run a shell command as webdataset does, but in a session of its own.

    The whole pipeline can then be killed, and Ctrl-C, after which a run finishes its step, does
    not reach it.
    """
    with _commands_lock:
        if _commands is None:
            raise Unreadable("the process is ending")
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
    """Kill a command, and its process group if it leads one."""
    with suppress(ProcessLookupError, PermissionError):
        if os.getpgid(process.pid) == process.pid:
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _make_room(folder: Path, size: int, limit_gib: float) -> bool:
    """Remove the oldest shards of the cache until `size` bytes fit. False if they cannot fit."""
    limit = limit_gib * 2**30 if limit_gib > 0 else float("inf")
    if size > limit:
        return False
    kept = []
    for file in folder.iterdir():
        with suppress(FileNotFoundError):  # other processes remove files, too
            stat = file.stat()
            if file.suffix == ".tmp" and time.time() - stat.st_mtime > 3600:
                file.unlink()  # left over from a killed process
            elif file.suffix == ".tar":
                kept.append((stat.st_mtime_ns, stat.st_size, file))
    used = sum(held for _, held, _ in kept)
    for _, held, file in sorted(kept):
        if used + size <= limit:
            break
        file.unlink(missing_ok=True)  # its readers have it open
        used -= held
    return True
