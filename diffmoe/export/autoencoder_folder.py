"""The autoencoder's folder, which is copied along with an exported model."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffmoe.errors import UserError
from diffmoe.export.tensors import write_file
from diffmoe.files import read_json
from diffmoe.latent_spec import LatentSpec

# Its subfolder of an exported model, and the value of `latents.autoencoder` there.
FOLDER = "vae"
_CONFIG = "config.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def local_folder(name: str) -> Path | None:
    """The folder that `LatentSpec.autoencoder` names, which may be missing; else None."""
    path = Path(name)
    return path if path.is_absolute() or path.is_dir() else None


def with_own_autoencoder(latents: LatentSpec, folder: Path) -> LatentSpec:
    """Latents of an exported folder, with the path of the autoencoder inside it if there is one."""
    if latents.autoencoder != FOLDER:
        return latents
    return latents.model_copy(update={"autoencoder": str((folder / FOLDER).absolute())})


def read_autoencoder_config(folder: Path) -> dict[str, Any]:
    """config.json of a diffusers autoencoder. Raises UserError if it is missing or damaged."""
    values = read_json(folder / _CONFIG)
    if not isinstance(values, dict):
        raise UserError(f"{folder / _CONFIG} is not the configuration of an autoencoder")
    return values


def autoencoder_files(folder: Path) -> list[str]:
    """Names of the files that diffusers reads. Raises UserError if there are none."""
    for weights in _WEIGHTS:
        index = folder / f"{weights}.index.json"
        if index.exists():
            try:
                parts = sorted(set(read_json(index)["weight_map"].values()))
                if all(Path(part).name == part for part in parts):
                    return [_CONFIG, index.name, *parts]
            except (KeyError, TypeError, AttributeError):
                pass
            raise UserError(f"{index} holds no weight_map of names to files beside it")
        if (folder / weights).exists():
            return [_CONFIG, weights]
    raise UserError(f"{folder} holds no weights of an autoencoder ({' or '.join(_WEIGHTS)})")


def copy_autoencoder(folder: Path, exported: Path) -> dict[str, dict[str, Any]]:
    """Copy it into an exported folder. Returns {file: {"bytes": ..., "sha256": ...}}."""
    (exported / FOLDER).mkdir()
    return {
        f"{FOLDER}/{name}": write_file(exported / FOLDER / name, _blocks(folder / name))
        for name in autoencoder_files(folder)
    }


def _blocks(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            yield block
