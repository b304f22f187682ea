"""Reads a folder of safetensors: one file, or several with an index, as Hugging Face has them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffmoe.errors import UserError
from diffmoe.export.tensors import Shapes
from diffmoe.files import check_safetensors, contained, read_json


class StoredTensors:
    """Every tensor by name. Files are memory-mapped; a tensor is read when it is requested.

    dtypes: by safetensors' names, F32, BF16, ... Raises UserError if a file is missing or damaged,
    or does not hold what the index lists.
    """

    def __init__(self, folder: Path, single: str) -> None:
        """single: name of the file if there is one; the index, if any, is `single`.index.json."""
        self.folder = folder
        self._index = folder / f"{single}.index.json"
        self._files: dict[str, str] = {}
        self.shapes: Shapes = {}
        self.dtypes: dict[str, str] = {}
        listed = self._listed() if self._index.exists() else None
        for file in [single] if listed is None else sorted(set(listed.values())):
            with self._opened(file) as stored:
                for name in stored.keys():  # noqa: SIM118 (no mapping)
                    part = stored.get_slice(name)
                    if name in self._files:
                        raise UserError(f"{folder}: {name} is in {file} and {self._files[name]}")
                    self._files[name] = file
                    self.shapes[name] = tuple(part.get_shape())
                    self.dtypes[name] = part.get_dtype()
        if listed is not None and listed != self._files:
            name, file = sorted(set(listed.items()) ^ set(self._files.items()))[0]
            raise UserError(f"{self._index} and {file} do not agree on where {name} is")

    @property
    def files(self) -> list[str]:
        """Names of the files with tensors, and of their index."""
        index = [self._index.name] if self._index.exists() else []
        return [*index, *sorted(set(self._files.values()))]

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor as it is stored. rows: of dimension 0; None: all."""
        with self._opened(self._files[name]) as stored:
            return stored.get_tensor(name) if rows is None else stored.get_slice(name)[rows]

    def _listed(self) -> dict[str, str]:
        index = read_json(contained(self.folder, self._index.name))
        found = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise UserError(f"{self._index} has no weight_map of names to files")
        outside = [file for file in found.values() if Path(file).name != file]
        if outside:
            raise UserError(f"{self._index} lists {outside[0]}, outside of its folder")
        return found

    @contextlib.contextmanager
    def _opened(self, file: str) -> Iterator[safe_open]:
        path = contained(self.folder, file)
        try:
            check_safetensors(path)
            with safe_open(path, framework="pt") as stored:
                yield stored
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is missing or damaged ({error}); get it again") from None


def verify_checksums(checksums: Path, needed: Iterable[str], digest: Callable[[Path], str]) -> int:
    """Compare the files that a checksums.json lists with it. Returns their number.

    needed: names that it must list. digest: gives a file's SHA-256. Raises UserError naming the
    first file that is missing or damaged.
    """
    try:
        files = read_json(checksums)["files"]
        listed = {str(name): str(entry["sha256"]) for name, entry in files.items()}
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{checksums} is damaged; convert the model again") from None
    if not set(needed) <= listed.keys():
        raise UserError(f"{checksums} does not list every file; convert the model again")
    for name, expected in listed.items():
        part = contained(checksums.parent, name)
        if not part.is_file() or digest(part) != expected:
            raise UserError(
                f"{part} is missing, or differs from its checksum; get it again, or convert the "
                "model again (diffmoe.load and Pipeline take verify=False)"
            )
    return len(listed)
