"""The folder of an autoencoder, which comes along with a model that is exported."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffmoe.errors import UserError
from diffmoe.export.metadata import Latents
from diffmoe.export.tensors import write_file
from diffmoe.files import read_json

# Its name in an exported folder, and `latents.autoencoder` there.
FOLDER = "vae"
_CONFIG = "config.json"
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def local_folder(name: str) -> Path | None:
    """The folder that `latents.autoencoder` names, there or not; None for pixels and hub ids."""
    path = Path(name)
    return path if path.is_absolute() or path.is_dir() else None


def opened_from(latents: Latents, folder: Path) -> Latents:
    """Of an exported folder: with the autoencoder that came along found from anywhere."""
    if latents.autoencoder != FOLDER:
        return latents
    return latents.model_copy(update={"autoencoder": str((folder / FOLDER).absolute())})


def own_config(folder: Path) -> dict[str, Any]:
    """config.json of a diffusers autoencoder. Raises UserError where there is none."""
    values = read_json(folder / _CONFIG)
    if not isinstance(values, dict):
        raise UserError(f"{folder / _CONFIG} is no configuration of an autoencoder")
    return values


def autoencoder_files(folder: Path) -> list[str]:
    """The files that diffusers reads. Raises UserError where they are not there."""
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
    raise UserError(f"{folder} holds no weights of an AutoencoderKL ({' or '.join(_WEIGHTS)})")


def copy_autoencoder(folder: Path, exported: Path) -> dict[str, dict[str, Any]]:
    """Copy it into an exported folder. -> {file: {"bytes": ..., "sha256": ...}}."""
    (exported / FOLDER).mkdir()
    return {
        f"{FOLDER}/{name}": write_file(exported / FOLDER / name, _blocks(folder / name))
        for name in autoencoder_files(folder)
    }


def _blocks(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            yield block
