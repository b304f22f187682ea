"""The pickled index of older checkpoints, read without running any of it.

A pickle is a program for a small stack machine, and some of its operations call functions that it
names. Here the two dozen operations that occur in torch's index are interpreted, and nothing is
called: each call becomes an `_Object`, which is then checked against what is expected in its place.
"""

import pickletools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from diffmoe.files import read_bytes

OLD_FILE_NAME = ".metadata"
_LIMIT = 16 << 20
_METADATA = "torch.distributed.checkpoint.metadata"
# Everything that an index refers to; no name has a dot.
_NAMES = {
    *(
        (_METADATA, name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    *(("torch", name) for name in ("float32", "float16", "bfloat16", "float64")),
    *(("torch", name) for name in ("int64", "int32", "uint8", "bool")),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
    ("builtins", "getattr"),  # some Pythons (3.11.2, say) pickle enumeration members so
}


class _Name(NamedTuple):
    """A function or type that the pickle refers to."""

    module: str
    name: str


class _Object:
    """A call that was not made. state: set by a later operation."""

    def __init__(self, kind: _Name, arguments: tuple) -> None:
        self.kind, self.arguments, self.state = kind, arguments, None


def read_old_index(file: Path) -> dict[str, Any]:
    """The fields of index.Index. Raises ValueError for anything that is not such an index."""
    try:
        return fields_of(read_bytes(file, _LIMIT))
    # A damaged pickle raises errors of many kinds: an empty stack, a wrong type, a cut string.
    except Exception as error:
        raise ValueError(f"{file} is not an index: {type(error).__name__}: {error}") from None


def fields_of(data: bytes) -> dict[str, Any]:
    """The same, from a pickle's bytes. Raises errors of many kinds if these are damaged."""
    return _fields(_interpret(data), len(data))


def _interpret(data: bytes) -> Any:
    """The value of a pickle of protocol 4 or 5, with an `_Object` for each call in it."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []

    def popped(number: int) -> list[Any]:
        if number > len(stack) - (marks[-1] if marks else 0):
            raise ValueError("it takes from an empty stack")
        values = stack[len(stack) - number :]
        del stack[len(stack) - number :]
        return values

    def since_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    for operation, argument, _ in pickletools.genops(data):
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                (value,) = popped(1)
                return value
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(operation.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(argument)
            case "SHORT_BINUNICODE" | "BINUNICODE":
                stack.append(argument)
            case "MEMOIZE":
                memo.append(stack[-1])
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[_of(argument, int)])
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(popped(int(operation.name[-1]))))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND" | "APPENDS":
                values = popped(1) if operation.name == "APPEND" else since_mark()
                _of(stack[-1], list).extend(values)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM" | "SETITEMS":
                values = popped(2) if operation.name == "SETITEM" else since_mark()
                for key, value in zip(values[::2], values[1::2], strict=True):
                    _of(stack[-1], dict)[_of(key, str, _Object)] = value
            case "STACK_GLOBAL":
                name = _Name(*(_of(part, str) for part in popped(2)))
                if name not in _NAMES:
                    raise ValueError(f"{name.module}.{name.name} has no place in it")
                stack.append(name)
            case "NEWOBJ" | "REDUCE":
                kind, arguments = popped(2)
                stack.append(_Object(_of(kind, _Name), _of(arguments, tuple)))
            case "BUILD":
                (state,) = popped(1)
                built = _of(stack[-1], _Object)
                if built.state is not None:
                    raise ValueError("it sets a state twice")
                built.state = state
            case other:
                raise ValueError(f"the operation {other} has no place in it")
    raise ValueError("it does not end")


def _fields(value: Any, limit: int) -> dict[str, Any]:
    """Metadata as the fields of index.Index.

    limit: of the number of pieces, because a small pickle can refer to the same one repeatedly.
    """
    state = _state(value, "Metadata")
    places = {}
    for key, place in _of(state["storage_data"], dict).items():
        where = _state(key, "MetadataIndex")
        found = _state(place, "_StorageInfo")
        if found.get("transform_descriptors"):
            raise ValueError("its pieces are transformed")
        places[_of(where["fqn"], str), _sides(where["offset"])] = {
            "file": _of(found["relative_path"], str),
            "at": _of(found["offset"], int),
            "bytes": _of(found["length"], int),
        }
    tensors: dict[str, Any] = {}
    number = 0
    for name, stored in _of(state["state_dict_metadata"], dict).items():
        tensor = _state(stored, "TensorStorageMetadata")
        number += len(tensor["chunks"])
        if number > limit:
            raise ValueError(f"it lists more than {limit} pieces")
        dtype = _of(_of(_object(tensor["properties"], "TensorProperties").state, tuple)[0], _Name)
        tensors[_of(name, str)] = {
            "dtype": dtype.name,
            "shape": _sides(tensor["size"]),
            "pieces": list(_pieces(name, _of(tensor["chunks"], list), places)),
        }
    return {"tensors": tensors}


def _pieces(name: str, chunks: list, places: dict) -> Iterator[dict[str, Any]]:
    for chunk in chunks:
        state = _state(chunk, "ChunkStorageMetadata")
        start = _sides(state["offsets"])
        yield {"start": start, "size": _sides(state["sizes"]), **places[name, start]}


def _state(value: Any, name: str) -> dict:
    return _of(_object(value, name).state, dict)


def _object(value: Any, name: str) -> _Object:
    if _of(value, _Object).kind.name != name:
        raise ValueError(f"there is a {value.kind.name} where a {name} belongs")
    return value


def _sides(value: Any) -> tuple[int, ...]:
    (sides,) = _object(value, "Size").arguments
    return tuple(_of(side, int) for side in _of(sides, tuple))


def _of(value: Any, *kinds: type) -> Any:
    if type(value) not in kinds:
        raise ValueError(f"there is a {type(value).__name__} where a {kinds[0].__name__} belongs")
    return value
