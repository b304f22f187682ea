"""An exported model's folder, opened: its tensors by name, and the network ready to run.

model.safetensors      the tensors, or model-00001-of-00003.safetensors ... with
                       model.safetensors.index.json
config.json            Metadata
vae/                   the autoencoder, where it was a folder of the machine that wrote this
thresholds.json        calibrated capacities by name, where there are any
checksums.json         sizes and SHA-256 of the tensors and config.json
README.md              the model card
"""

from collections.abc import Callable
from pathlib import Path

import torch

from diffmoe.errors import UserError
from diffmoe.export.metadata import FILE_NAME, Metadata, read_about
from diffmoe.export.stored_tensors import StoredTensors, hold_against
from diffmoe.export.tensors import (
    DTYPE_NAMES,
    SINGLE,
    check_state_dict,
    empty_network,
    fill,
    stored_dtype,
)
from diffmoe.files import contained, read_json, sha256_of
from diffmoe.hash_cache import cached_sha256
from diffmoe.models.dit import DiT
from diffmoe.parallel.topology import Topology

CHECKSUMS, CARD = "checksums.json", "README.md"


def is_exported(path: Path) -> bool:
    """Whether a folder is of this format, whole or not. Raises UserError if that can't be told."""
    file = path / FILE_NAME
    if not file.exists():
        return False
    values = read_json(file)
    return isinstance(values, dict) and values.get("format") == "diffmoe"


class ExportedModel(StoredTensors):
    """`about`, and every tensor by name.

    Raises UserError where the files do not fit each other or config.json.
    """

    def __init__(self, path: Path) -> None:
        self.about: Metadata = read_about(path)
        super().__init__(path, SINGLE)
        check_state_dict(self.shapes, self.about.model, self.about.moe, str(path))
        for name, found in self.dtypes.items():
            dtype = stored_dtype(name, getattr(torch, self.about.dtype))
            if found != DTYPE_NAMES[dtype]:
                raise UserError(f"{path}: {name} is {found}, {FILE_NAME} says {DTYPE_NAMES[dtype]}")

    def verify(self, digest: Callable[[Path], str] = sha256_of) -> int:
        """Hold every file against checksums.json; how many these are.

        digest: gives a file's SHA-256; the default reads it. Raises UserError naming the first that
        is not as it was written.
        """
        return hold_against(contained(self.folder, CHECKSUMS), [FILE_NAME, *self.files], digest)


def load_exported(
    path: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    topology: Topology | None = None,
    verify: bool = True,
) -> tuple[DiT, Metadata]:
    """The network of an exported folder, for evaluation; it never exists twice.

    topology: of ranks that share the experts; each reads its own ones. verify: hold the files
    against their checksums, once per machine. Raises UserError where one is damaged.
    """
    model = ExportedModel(path)
    if verify:
        model.verify(cached_sha256)
    network = empty_network(model.about.model, model.about.moe, topology, device, dtype)
    return fill(network, model.read).requires_grad_(False), model.about
