"""An exported model's folder, opened: its tensors by name, and the network ready to run.

    model.safetensors      the tensors, or model-00001-of-00003.safetensors ... with
                           model.safetensors.index.json
    config.json            About
    thresholds.json        calibrated capacities by name, where there are any
    checksums.json         sizes and SHA-256 of the tensors and config.json
    README.md              the model card
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffmoe.conversion.about import FILE_NAME, About, read_about, read_json
from diffmoe.conversion.tensors import INDEX, SINGLE, Shapes, account, empty_network, fill
from diffmoe.errors import UserError
from diffmoe.models.dit import DiT
from diffmoe.parallel.topology import Topology

CHECKSUMS, CARD = "checksums.json", "README.md"


def is_exported(path: Path) -> bool:
    """Whether a folder is of this format, whole or not."""
    try:
        return read_json(path / FILE_NAME).get("format") == "diffmoe"
    except (UserError, AttributeError):
        return False


class ExportedModel:
    """about, and every tensor by name: `shapes`, `read`. Files are mapped, not read, until asked.

    Raises UserError where the files do not fit each other or config.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.about: About = read_about(path)
        self._files: dict[str, str] = {}
        self.shapes: Shapes = {}
        for file in self._names():
            with self._opened(file) as stored:
                for name in stored.keys():  # noqa: SIM118 (no mapping)
                    part = stored.get_slice(name)
                    self._check_dtype(name, part.get_dtype())
                    if name in self._files:
                        raise UserError(f"{path}: {name} is in {file} and {self._files[name]}")
                    self._files[name] = file
                    self.shapes[name] = tuple(part.get_shape())
        self._check_index()
        account(self.shapes, self.about.model, self.about.moe, str(path))

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor as it is stored. rows: of dimension 0 alone."""
        with self._opened(self._files[name]) as stored:
            return stored.get_tensor(name) if rows is None else stored.get_slice(name)[rows]

    def _names(self) -> list[str]:
        if not (self.path / INDEX).exists():
            return [SINGLE]
        files = sorted(set(self._weight_map().values()))
        strange = [file for file in files if Path(file).name != file]
        if strange:
            raise UserError(f"{self.path / INDEX} names {strange[0]}, outside of its folder")
        return files

    def _weight_map(self) -> dict[str, str]:
        index = read_json(self.path / INDEX)
        found = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
            raise UserError(f"{self.path / INDEX} holds no weight_map of names to files")
        return found

    def _check_index(self) -> None:
        if (self.path / INDEX).exists() and self._weight_map() != self._files:
            differing = sorted(set(self._weight_map().items()) ^ set(self._files.items()))
            name, file = differing[0]
            raise UserError(f"{self.path / INDEX} and {file} do not agree on where {name} is")

    def _check_dtype(self, name: str, dtype: str) -> None:
        wanted = {"float32": "F32", "bfloat16": "BF16"}[self.about.dtype]
        wanted = "F32" if name.endswith(".thresholds") else wanted
        if dtype != wanted:
            raise UserError(f"{self.path}: {name} is {dtype}, {FILE_NAME} says {wanted}")

    @contextlib.contextmanager
    def _opened(self, file: str) -> Iterator[safe_open]:
        path = self.path / file
        try:
            with safe_open(path, framework="pt") as stored:
                yield stored
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} is missing or damaged ({error}); convert it again") from None


def load_exported(
    path: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    topology: Topology | None = None,
) -> tuple[DiT, About]:
    """The network of an exported folder, for evaluation; it never exists twice.

    topology: of ranks that share the experts; each reads its own ones.
    """
    model = ExportedModel(path)
    network = empty_network(model.about.model, model.about.moe, topology, device, dtype)
    return fill(network, model.read).requires_grad_(False), model.about
