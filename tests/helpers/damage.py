"""Damage to files, seeded, and a watch on time and memory while they are read."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

SECONDS, BYTES = 10, 1 << 30  # that a reading may take

Bytes = Callable[[bytes, random.Random], bytes]
InPlace = Callable[[Path, random.Random], None]


VALUES = [None, -1, 0, 1, 3, 1 << 20, 10**9, 10**30, 1e308, float("nan"), "", True, [], {}]
VALUES += ["../../etc/passwd", "/dev/zero", "pipe:exit 1", [[[]]], {"a": 1}, "x" * 100_000]


# To the bytes of a file.


def truncated(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))]


def flipped(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 8, 64])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flipped_at_an_end(raw: bytes, rng: random.Random) -> bytes:
    """Headers stand there, and the directories of zip files."""
    changed = bytearray(raw)
    for _ in range(rng.choice([1, 2, 4])):
        place = rng.randrange(min(len(raw), 600))
        changed[place if rng.random() < 0.5 else -1 - place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def inserted(raw: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(raw))
    return raw[:place] + rng.randbytes(rng.choice([1, 8, 4096])) + raw[place:]


def swapped(raw: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(raw)) for _ in range(2))
    return raw[:a] + raw[b:] + raw[a:b]


def another_number(raw: bytes, rng: random.Random) -> bytes:
    """One that is written in digits, as in JSON, YAML, and the headers of npy and tar."""
    found = list(re.finditer(rb"\d+", raw[:100_000]))
    if not found:
        return flipped(raw, rng)
    number = rng.choice(found)
    size = len(number[0])
    new = rng.choice([b"-1", b"0", b"1048576", b"9" * size, b"7" * size, b"9" * 12, b"1" * 5000])
    return raw[: number.start()] + new + raw[number.end() :]


def another_word(raw: bytes, rng: random.Random) -> bytes:
    """Four or eight bytes, as lengths and offsets are written in binary files."""
    size = rng.choice([4, 8])
    place = rng.randrange(max(1, min(len(raw) - size, rng.choice([64, 1 << 30]))))
    word = rng.choice([b"\xff" * size, b"\x7f" * size, b"\0" * size, b"\0" * (size - 1) + b"\x01"])
    return raw[:place] + word + raw[place + size :]


def another_value(raw: bytes, rng: random.Random) -> bytes:
    """Of JSON, one value or key changed; of anything else a flipped byte."""
    try:
        content = json.loads(raw)
    except ValueError:
        return flipped(raw, rng)
    places: list[tuple[dict | list, str | int]] = []

    def walk(node) -> None:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    if isinstance(content, dict | list):
        walk(content)
    if not places:
        return flipped(raw, rng)
    node, key = rng.choice(places)
    if isinstance(node, dict) and rng.random() < 0.2:
        del node[key]
    else:
        node[key] = rng.choice(VALUES)
    return json.dumps(content).encode()


def nested(raw: bytes, rng: random.Random) -> bytes:
    depth = rng.choice([500, 100_000])
    return rng.choice([b"[" * depth, b'{"a":' * depth, b"- " * depth, b"[" * depth + b"]" * depth])


def emptied(raw: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"", b"\0" * len(raw), b"null", b"[]", b"{}", b"7", b'"x"', b"\xff\xfe"])


# To a file where it lies.


def endless(file: Path, _: random.Random) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def a_pipe(file: Path, _: random.Random) -> None:
    """Opening it waits for somebody who writes."""
    file.unlink()
    os.mkfifo(file)


def a_folder(file: Path, _: random.Random) -> None:
    file.unlink()
    file.mkdir()


def gone(file: Path, _: random.Random) -> None:
    file.unlink()


def dangling(file: Path, _: random.Random) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def a_loop(file: Path, _: random.Random) -> None:
    file.unlink()
    file.symlink_to(file.name)


def full_of_holes(file: Path, _: random.Random) -> None:
    """A terabyte of zeros that takes no space."""
    os.truncate(file, 1 << 40)


TO_BYTES: list[Bytes] = [
    truncated,
    flipped,
    flipped_at_an_end,
    inserted,
    swapped,
    another_number,
    another_word,
    another_value,
    nested,
    emptied,
]
IN_PLACE: list[InPlace] = [endless, a_pipe, a_folder, gone, dangling, a_loop, full_of_holes]


def damage(file: Path, rng: random.Random) -> str:
    """Damage a file in one of the ways; its name."""
    if rng.random() < 0.1:
        how = rng.choice(IN_PLACE)
        how(file, rng)
    else:
        how = rng.choice(TO_BYTES)
        file.write_bytes(how(file.read_bytes(), rng))
    return how.__name__


class TooLong(BaseException):
    """No OSError, as TimeoutError is: nothing that is read catches it."""


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Raises AssertionError for a block that takes too long or too much memory."""

    def too_long(*_) -> None:
        raise TooLong(f"it took over {SECONDS} s")

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, data = _memory("VmRSS"), resource.getrlimit(resource.RLIMIT_DATA)
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)
    # Far beyond what is allowed, a machine is not to suffer for it.
    resource.setrlimit(resource.RLIMIT_DATA, (_memory("VmData") + 4 * BYTES, data[1]))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_DATA, data)
    assert _memory("VmHWM") - before < BYTES


def _memory(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)[1]) << 10


def copied(original: Path, copy: Path) -> None:
    """A fresh copy of a file or folder, whatever stands there."""
    if copy.is_dir() and not copy.is_symlink():
        shutil.rmtree(copy)
    else:
        copy.unlink(missing_ok=True)
    (shutil.copytree if original.is_dir() else shutil.copy)(original, copy)
