"""The index of a checkpoint: what is written, what of before is read, what never runs."""

import copyreg
import io
import json
import pickle
import struct
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from diffmoe.checkpoints import old_index
from diffmoe.checkpoints.checksums import find_damage
from diffmoe.checkpoints.index import read_index
from diffmoe.checkpoints.inspect import compare, open_checkpoint
from diffmoe.checkpoints.network import load_network
from diffmoe.checkpoints.old_index import _NAMES, fields_of
from diffmoe.checkpoints.pieces import Piece, write_pieces
from diffmoe.conversion.detect_format import open_source
from diffmoe.errors import UserError
from tests.helpers.runs import pack, run_config, tensors, train

OLD = Path(__file__).parent / "old_checkpoint.tar.xz"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Of two ranks that shared the experts, written when the index was torch's pickle."""
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "step-00000002"


def test_an_old_checkpoint_is_read_bit_for_bit(old: Path):
    assert find_damage(old) == []
    assert not (old / "index.json").exists()
    reader = dcp.FileSystemReader(old)  # torch's own, which unpickles
    stored = reader.read_metadata().state_dict_metadata
    expected = {name: torch.full(item.size, torch.nan) for name, item in stored.items()}
    dcp.load(expected, storage_reader=reader, no_dist=True)
    found = tensors(old)
    assert list(found) == list(expected)
    assert len(found) == 145
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert read_index(old).tensors["weights/blocks.1.feed_forward.experts.w_in"].shape == (512,)
    with open_source(old) as source:
        assert torch.equal(
            source.read("final.weight").flatten(), expected["ema/final.weight"].flatten()
        )


def test_an_old_run_goes_on_and_is_saved_anew(old: Path):
    run = old.parent / "run"
    run.mkdir()
    old.rename(run / old.name)
    pack(old.parent / "data", shape=(2, 4, 4))
    smaller = {"model__input_size": 4, "model__width": 8, "model__depth": 2, "moe__experts": 2}
    config = run_config(old.parent, 3, **smaller)
    train(config)  # on one rank, without sharing experts
    new = run / "step-00000003"
    assert find_damage(new) == []
    assert sorted(p.name for p in new.iterdir()) == [
        "__0_0.distcp",
        "checksums.json",
        "index.json",
        "run.json",
    ]
    with open_checkpoint(run / old.name) as a, open_checkpoint(new) as b:
        assert all(d.problem is None for d in compare(a, b))
    before, after = (json.loads((run / name / "run.json").read_text()) for name in (old.name, new))
    assert list(after) == list(before)  # the stored names, in their order
    assert list(after["saved_by"]) == list(before["saved_by"])


def test_what_is_written_is_what_torch_would_have_known(tmp_path: Path):
    (tmp_path / "a").mkdir()
    state = {
        "ema/x": Piece.of(torch.arange(6.0), 0, 6),
        "buffers/y": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    }
    hashes = write_pieces(state, tmp_path / "a", None)
    assert sorted(hashes) == ["__0_0.distcp", "index.json"]
    index = json.loads((tmp_path / "a/index.json").read_text())
    pieces = {name: entry.pop("pieces") for name, entry in index["tensors"].items()}
    assert index == {
        "version": 1,
        "tensors": {
            "ema/x": {"dtype": "float32", "shape": [6]},
            "buffers/y": {"dtype": "bfloat16", "shape": [2, 3]},
        },
    }
    for name, ((piece,), start, size) in {
        "ema/x": (pieces["ema/x"], [0], [6]),
        "buffers/y": (pieces["buffers/y"], [0, 0], [2, 3]),
    }.items():
        assert (piece["start"], piece["size"], piece["file"]) == (start, size, "__0_0.distcp")
        with open(tmp_path / "a/__0_0.distcp", "rb") as file:
            file.seek(piece["at"])
            raw = file.read(piece["bytes"])
        assert torch.equal(
            torch.load(io.BytesIO(raw), weights_only=True).flatten(), state[name].flatten()
        )


CHANGES = {
    "a piece out of the tensor": ("start", [1], "begins at"),
    "two dimensions of one": ("start", [0, 0], "begins at"),
    "more numbers than bytes": ("bytes", 4, "in 4 bytes of"),
    "past the file's end": ("at", 1 << 40, r"__0_0\.distcp has \d+ bytes"),
    "a file elsewhere": ("file", "../../secret.distcp", "String should match"),
    "an absolute file": ("file", "/dev/zero", "String should match"),
    "a file that is not there": ("file", "__7_0.distcp", "cannot be read: No such file"),
    "a size that is no number": ("size", ["6"], None),
    "a negative place": ("at", -1, "greater than or equal to 0"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_that_its_files_cannot_hold_is_refused(tmp_path: Path, change: str):
    write_pieces({"ema/x": Piece.of(torch.arange(6.0), 0, 6)}, tmp_path, None)
    field, value, told = CHANGES[change]
    file = tmp_path / "index.json"
    index = json.loads(file.read_text())
    index["tensors"]["ema/x"]["pieces"][0][field] = value
    file.write_text(json.dumps(index))
    if told is None:
        assert read_index(tmp_path).tensors["ema/x"].pieces[0].size == (6,)
        return
    with pytest.raises(UserError, match=told) as raised:
        read_index(tmp_path)
    assert str(raised.value).startswith(f"{tmp_path} is damaged (")


# A pickle by hand: what puts a callable and arguments on the stack, and what calls.
def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _names() -> Iterator[tuple[str, str]]:
    """Every name that an index may hold, and from each of their modules a way to a command."""
    yield from _NAMES
    for module in sorted({module for module, _ in _NAMES}):
        for way in ("os.system", "sys.modules", "__builtins__", "os", "__loader__.load_module"):
            yield module, way
    yield from [("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec")]
    yield from [("torch", "load"), ("torch", "ops.load_library"), ("builtins", "__import__")]


COMMAND = "touch was-run"  # in the current folder
ARGUMENTS = {
    "none": b")",
    "a command": _text(COMMAND) + b"\x85",
    "a number": b"K\x01\x85",
    "a tuple": b"K\x01\x85\x85",
    "a name of a name": b"c" + b"torch\nSize\n" + _text("__init__") + b"\x86",
}
GLOBALS = {
    "GLOBAL": lambda module, name: b"c" + module.encode() + b"\n" + name.encode() + b"\n",
    "STACK_GLOBAL": lambda module, name: _text(module) + _text(name) + b"\x93",
}
# (what comes before the global, between it and the arguments, after them)
CALLS = {
    "REDUCE": (b"", b"", b"R"),
    "NEWOBJ": (b"", b"", b"\x81"),
    "NEWOBJ_EX": (b"", b"", b"}\x92"),
    "OBJ": (b"(", b"", b"o"),
    "BUILD": (b"", b"", b"b"),
    "BUILD with slots": (b"", b"N", b"\x86b"),
    "REDUCE, then BUILD": (b"", b"", b"R}" + _text("__class__") + _text("x") + b"sb"),
    "REDUCE of what came": (b"", b"", b"R)R"),
    "nothing": (b"", b"", b"0"),
}


def _pickles() -> Iterator[tuple[str, bytes]]:
    for module, name in _names():
        for how, put in GLOBALS.items():
            for call, (before, between, after) in CALLS.items():
                for kind, arguments in ARGUMENTS.items():
                    body = before + put(module, name) + between + arguments + after
                    told = f"{how} {module} {name}, {call} with {kind}"
                    yield told, b"\x80\x04" + body + b"."
        inst = b"(" + _text(COMMAND) + f"i{module}\n{name}\n".encode()
        yield f"INST {module} {name}", b"\x80\x04" + inst + b"."
    for code in (b"\x82\x01", b"\x83\x01\x00", b"\x84\x01\x00\x00\x00"):
        yield "EXT", b"\x80\x04" + code + _text(COMMAND) + b"\x85R."
    for code in (b"Pname\n", _text("name") + b"Q", b"\x97", b"\x97\x98"):
        yield "PERSID or BUFFER", b"\x80\x05" + code + b"."


def test_no_operation_of_a_pickle_calls_anything(tmp_path: Path, monkeypatch):
    """Every operation that calls, every name, both ways to write it, each kind of arguments."""
    monkeypatch.chdir(tmp_path)
    seen, now = [], None
    monkeypatch.setitem(copyreg._inverted_registry, 1, ("os", "system"))
    pickles = [data for _, data in _pickles()]
    assert len(pickles) > 5000

    def watch(event: str, arguments: tuple) -> None:
        if now is not None and event.split(".")[0] in ("os", "subprocess", "import", "open"):
            seen.append((now, event, arguments))

    sys.addaudithook(watch)  # it stays, and is deaf after this test
    for now in pickles:
        with pytest.raises(Exception, match=r"."):
            fields_of(now)
    now = None
    assert seen == []
    assert not Path("was-run").exists()


def test_commands_in_an_index_are_refused_by_all_that_read_one(old: Path, monkeypatch):
    monkeypatch.chdir(old.parent)
    dotted = _text("torch.distributed.checkpoint.metadata") + _text("os.system") + b"\x93"
    (old / ".metadata").write_bytes(b"\x80\x04" + dotted + _text(COMMAND) + b"\x85R.")
    for read in (
        lambda: load_network(old),
        lambda: open_checkpoint(old).__enter__(),
        lambda: read_index(old),
    ):
        with pytest.raises(
            UserError, match=r"os\.system has no place in it.*take an older"
        ) as told:
            read()
        assert f"{old}/.metadata" in str(told.value)
    assert not Path("was-run").exists()
    (old / ".metadata").write_bytes(b"\x80\x04r\xff\xff\xff\x7f.")  # a memo of 34 GB
    with pytest.raises(UserError, match=r"LONG_BINPUT has no place in it"):
        read_index(old)


class ByName:
    """Pickles as some Pythons (3.11.2 is one) pickle a member of an enumeration."""

    def __reduce__(self):
        return (getattr, (_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT"))


def test_members_of_enumerations_by_name_are_interpreted_without_being_looked_up():
    found = old_index._interpret(pickle.dumps(ByName(), protocol=4))
    assert found.kind == ("builtins", "getattr")
    assert found.arguments[0].name == "_MEM_FORMAT_ENCODING"
