"""A thousand seeded mutations of small files: an error that says something, or the right result."""

import contextlib
import json
import pickle
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffmoe.conversion.foreign import Options
from diffmoe.conversion.recognise import open_source
from diffmoe.errors import UserError
from tests.conversion.models import exported, release_file
from tests.tiny import tiny_config
from tests.training.runs import newest

SECONDS = 20  # for one reading; the slowest takes a fraction of one


def tensors(path: Path) -> dict[str, Tensor]:
    """All that a conversion would read."""
    options = Options(objective="flow", heads=2, num_classes=10)
    with open_source(path, options=options) as source:
        source = source.checked()
        return {name: source.read(name).clone() for name in source.shapes}


# What every kind of damage may do to bytes.
def truncated(raw: bytes, rng: random.Random) -> bytes:
    return raw[: rng.randrange(len(raw))]


def flipped(raw: bytes, rng: random.Random) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.choice([1, 1, 1, 8, 64])):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def inserted(raw: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(raw))
    return raw[:place] + rng.randbytes(rng.choice([1, 8, 4096])) + raw[place:]


def swapped(raw: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(raw)) for _ in range(2))
    return raw[:a] + raw[b:] + raw[a:b]


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
        node[key] = rng.choice(
            [None, -1, 0, 1, 3, 10**9, 10**30, 1e308, "", "../../etc/passwd", [], {}, True]
        )
    return json.dumps(content).encode()


MUTATIONS: list[Callable[[bytes, random.Random], bytes]] = [
    truncated,
    flipped,
    inserted,
    swapped,
    another_value,
]


@contextlib.contextmanager
def limited() -> Iterator[None]:
    def too_long(*_) -> None:
        raise TimeoutError(f"reading took over {SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fuzz(original: Path, scratch: Path, rounds: int, seed: int) -> int:
    """Mutate one file of a copy at a time; how many of the rounds ended in an error."""
    expected, rng, refused = tensors(original), random.Random(seed), 0
    files = [original] if original.is_file() else sorted(original.iterdir())
    for turn in range(rounds):
        copy = scratch / f"copy-{original.name}"
        if original.is_file():
            shutil.copy(original, copy)
        else:
            shutil.copytree(original, copy)
        file = rng.choice(files)
        target = copy if original.is_file() else copy / file.name
        mutate = rng.choice(MUTATIONS)
        target.write_bytes(mutate(file.read_bytes(), rng))
        where = f"round {turn}: {mutate.__name__} of {file.name}"
        found, told = None, ""
        try:
            with limited():
                found = tensors(copy)
        except UserError as error:
            told = str(error)
        except BaseException as error:
            raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
        if found is None:
            refused += 1
            assert len(told) > 20, where
        else:
            assert found.keys() == expected.keys(), where
            wrong = [name for name in expected if not torch.equal(found[name], expected[name])]
            assert wrong == [], where
        if original.is_file():
            copy.unlink()
        else:
            shutil.rmtree(copy)
    return refused


def test_damaged_exported_folders(tmp_path):
    folder = exported(tmp_path / "model", tiny_config(model__depth=2))
    assert fuzz(folder, tmp_path, 400, seed=1) > 200


def test_damaged_release_files(tmp_path):
    file = release_file(tmp_path / "release.pt", "diffmoe_interleave")
    assert fuzz(file, tmp_path, 400, seed=2) > 200


def test_damaged_checkpoints(single_run, tmp_path):
    folder = tmp_path / "step-00000003"
    shutil.copytree(newest(single_run), folder)
    assert fuzz(folder, tmp_path, 200, seed=3) > 100


class Payload:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize("form", ["pickle", "torch", "torch in a state dict"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, form):
    mark, file = tmp_path / "was run", tmp_path / "evil.pt"
    payload = Payload(mark)
    if form == "pickle":
        file.write_bytes(pickle.dumps({"ema": payload}))
    elif form == "torch":
        torch.save(payload, file)
    else:
        torch.save({"ema": {"weight": torch.zeros(2), "extra": payload}}, file)
    with pytest.raises(UserError, match=r"evil\.pt is refused"):
        tensors(file)
    assert not mark.exists()
