"""Small models to convert: random ones of ours, and the release's of tests/reference."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from diffmoe.config import Config
from diffmoe.export.metadata import parse_metadata
from diffmoe.export.sources import Source
from diffmoe.export.writing import write_exported
from tests.helpers.networks import network_of
from tests.helpers.tiny import tiny_config

REFERENCE = Path(__file__).parents[1] / "reference"
DIFFMOE = [
    "diffmoe_interleave",
    "diffmoe_every_layer",
    "diffmoe_swiglu",
    "diffmoe_shared_capacity2",
]
RELEASE = [*DIFFMOE, "ecdit", "tcdit", "dense"]
NAMES = ["plane", "car", "bird", "cat", "deer"]


def source_of(config: Config, **metadata) -> Source:
    """A random network whose experts are neither idle nor always at work."""
    network = network_of(config)
    model = config.model
    values = {
        "model": model,
        "moe": config.moe,
        "diffusion": config.diffusion,
        "latents": {"shape": model.latent_shape, "source": "noise"},
        "provenance": {"kind": "test", "name": "random"},
        **metadata,
    }
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    return Source(
        "a random network", parse_metadata(values, Path("test")), shapes, state.__getitem__
    )


def exported(folder: Path, config: Config | None = None, **metadata) -> Path:
    """An exported folder of a random network."""
    config = config or tiny_config(model__in_channels=3)
    write_exported(source_of(config, **metadata), folder)
    return folder


def reference(name: str) -> dict[str, Tensor]:
    """All tensors of a reference file."""
    with safe_open(REFERENCE / f"{name}.safetensors", framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def options_of(name: str) -> dict:
    """The release's own options of a reference file."""
    with safe_open(REFERENCE / f"{name}.safetensors", framework="pt") as file:
        return json.loads(file.metadata()["config"])


def release_state(name: str, thresholds_after: str | None = None) -> dict[str, Tensor]:
    """The release's state dict. thresholds_after: buffers of that part of the file in their place.

    As the release saves it, with its fixed positions and decays.
    """
    tensors = reference(name)
    state = {
        key.removeprefix("weights."): tensor
        for key, tensor in tensors.items()
        if key.startswith("weights.")
    }
    for key, tensor in tensors.items():
        if thresholds_after and key.startswith(f"{thresholds_after}."):
            state[key.removeprefix(f"{thresholds_after}.")] = tensor
    return state


def release_file(path: Path, name: str, thresholds_after: str | None = None, **entries) -> Path:
    """A .pt as the release writes it. entries: in the place of {"ema": state}."""
    torch.save(entries or {"ema": release_state(name, thresholds_after)}, path)
    return path


def release_input(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """x_t, t and labels of the reference's forward."""
    tensors = reference(name)
    t = tensors["in.t"].view(-1, 1, 1, 1)
    return t * tensors["in.x1"] + (1 - t) * tensors["in.noise"], tensors["in.t"], tensors["in.y"]


def flip_bytes(file: Path, place: int = -64) -> None:
    """Flip four bytes of the numbers; name, size and header stay."""
    data = bytearray(file.read_bytes())
    for offset in range(4):
        data[place + offset] ^= 0x40
    file.write_bytes(data)
