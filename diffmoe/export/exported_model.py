"""An exported model: its folder's files, its tensors by name, and its network ready to run.

model.safetensors      the tensors, or model-00001-of-00003.safetensors ... with
                       model.safetensors.index.json
config.json            Metadata
vae/                   the autoencoder, if it was a local folder when the model was exported
thresholds.json        calibrated capacities by name, if there are any
checksums.json         sizes and SHA-256 of the files above, without the thresholds
README.md              the model card

One that diffusers opens, too, has its tensors in transformer/ and more files: for_diffusers.py.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from diffmoe.errors import UserError
from diffmoe.export.for_diffusers import WEIGHTS, tensors_folder
from diffmoe.export.metadata import FILE_NAME, Metadata, read_metadata
from diffmoe.export.stored_tensors import StoredTensors, verify_checksums
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
    """Whether a folder has this format, complete or not. Raises UserError if config.json is not
    readable.
    """
    file = path / FILE_NAME
    if not file.exists():
        return False
    values = read_json(file)
    return isinstance(values, dict) and values.get("format") == "diffmoe"


class ExportedModel(StoredTensors):
    """An exported folder: `metadata`, and every tensor by name.

    Raises UserError if the files do not agree with each other or with config.json.
    """

    def __init__(self, path: Path) -> None:
        self.metadata: Metadata = read_metadata(path)
        self.path, inner = path, tensors_folder(path)
        super().__init__(inner or path, WEIGHTS if inner else SINGLE)
        check_state_dict(self.shapes, self.metadata.model, self.metadata.moe, str(path))
        for name, found in self.dtypes.items():
            dtype = stored_dtype(name, getattr(torch, self.metadata.dtype))
            if found != DTYPE_NAMES[dtype]:
                raise UserError(f"{path}: {name} is {found}, {FILE_NAME} says {DTYPE_NAMES[dtype]}")

    def verify(self, digest: Callable[[Path], str] = sha256_of) -> int:
        """Compare every file with checksums.json. Returns their number.

        digest: gives a file's SHA-256; the default reads the file. Raises UserError naming the
        first file that is missing or damaged.
        """
        inner = self.folder.relative_to(self.path)
        needed = [FILE_NAME, *((inner / file).as_posix() for file in self.files)]
        return verify_checksums(contained(self.path, CHECKSUMS), needed, digest)


def load_exported(
    path: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    topology: Topology | None = None,
    verify: bool = True,
) -> tuple[DiT, Metadata]:
    """The network of an exported folder, for evaluation. Takes the memory of one network.

    topology: of ranks that share the experts; each reads only its own. verify: compare the files
    with their checksums, once per machine. Raises UserError if one is damaged.
    """
    model = ExportedModel(path)
    if verify:
        model.verify(cached_sha256)
    network = empty_network(model.metadata.model, model.metadata.moe, topology, device, dtype)
    return fill(network, model.read).requires_grad_(False), model.metadata
