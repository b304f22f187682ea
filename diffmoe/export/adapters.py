"""Adapters: what a LoRA run has trained, in a folder apart from the model that it belongs to.

model.safetensors   the factors, other trained parameters, and the routing's state
config.json         AdapterMetadata
thresholds.json     calibrated capacities by name, if there are any
checksums.json      sizes and SHA-256 of the two

They belong to a base by its numbers, whatever file holds them: a run's checkpoint, or its export.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from diffmoe.clock import Clock
from diffmoe.config import LoRAConfig
from diffmoe.errors import UserError, describe_problem
from diffmoe.export.autoencoder_folder import FOLDER
from diffmoe.export.exported_model import CHECKSUMS
from diffmoe.export.metadata import FILE_NAME, Metadata
from diffmoe.export.stored_tensors import StoredTensors, verify_checksums
from diffmoe.export.tensors import SINGLE, Shapes, cast_parameters, empty_network, fill
from diffmoe.files import contained, read_json
from diffmoe.hash_cache import cached_sha256
from diffmoe.models.dit import DiT
from diffmoe.models.lora import factor_names, is_factor, merged
from diffmoe.models.moe import ROUTING_STATE

if TYPE_CHECKING:
    from diffmoe.checkpoints.network import Snapshot

FORMAT = "diffmoe adapters"


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Base(_Part):
    """The model that adapters belong to. name: as its run was called. The rest: `Fingerprint`."""

    name: str | None = None
    sha256: str
    experts: tuple[str, ...] = ()


class AdapterMetadata(_Part):
    """config.json. model: of base and adapters together, as an exported model has it."""

    format: Literal["diffmoe adapters"] = "diffmoe adapters"
    version: Literal[1] = 1
    lora: LoRAConfig = Field(description="rank, alpha and targets")
    base: Base
    model: Metadata


class Fingerprint(NamedTuple):
    """SHA-256 of tensors in fp32, with their names: all but experts', and of each expert's."""

    sha256: str
    experts: tuple[str, ...]


def fingerprint(
    names: Iterable[str], read: Callable[[str], Tensor], experts: Iterable[str]
) -> Fingerprint:
    """experts: names of tensors that count experts in dimension 0."""
    dense, of_expert, apart = hashlib.sha256(), dict[int, "hashlib._Hash"](), set(experts)
    for name in sorted(names):
        tensor = read(name).detach().float().contiguous()
        parts = [(dense, tensor)]
        if name in apart:
            parts = [
                (of_expert.setdefault(number, hashlib.sha256()), one)
                for number, one in enumerate(tensor)
            ]
        for digest, part in parts:
            digest.update(f"{name} {tuple(part.shape)} ".encode())
            digest.update(part.reshape(-1).view(torch.uint8).numpy().data)
    digests = tuple(of_expert[number].hexdigest() for number in sorted(of_expert))
    return Fingerprint(dense.hexdigest(), digests)


def is_adapters(path: Path) -> bool:
    """Whether a folder has this format. Raises UserError if config.json is not readable."""
    file = path / FILE_NAME
    if not file.exists():
        return False
    values = read_json(file)
    return isinstance(values, dict) and values.get("format") == FORMAT


def refuse_adapters(path: Path) -> None:
    """Raise UserError if a folder holds adapters, where a model is wanted."""
    if is_adapters(path):
        raise UserError(
            f"{path} holds adapters, which belong to a model: open that, with --adapters {path} "
            "(from Python: adapters=)"
        )


class Adapters(StoredTensors):
    """A folder of adapters: `metadata`, and every tensor by name.

    Raises UserError if it is none, or its files do not agree with each other.
    """

    def __init__(self, folder: Path) -> None:
        if not is_adapters(folder):
            raise UserError(
                f"{folder} holds no adapters; those of a LoRA run are written by "
                "python tools/convert_checkpoint.py RUN TO --adapters"
            )
        file = contained(folder, FILE_NAME)
        try:
            self.metadata = AdapterMetadata.model_validate(read_json(file))
        except ValidationError as error:
            problems = "; ".join(describe_problem(problem) for problem in error.errors())
            raise UserError(f"{file}: {problems}; write the adapters again") from None
        super().__init__(folder, SINGLE)

    def check(self) -> None:
        """Hold names and shapes of the tensors against the network that config.json describes.

        Raises UserError naming the first that does not fit.
        """
        about = self.metadata
        with torch.device("meta"):
            network = DiT(about.model.model, about.model.moe, lora=about.lora)
        expected: Shapes = {name: tuple(t.shape) for name, t in network.state_dict().items()}
        needed = {name for name in expected if is_factor(name) or name.endswith(ROUTING_STATE)}
        problems = [f"{name} is missing" for name in sorted(needed - self.shapes.keys())]
        problems += [
            f"{name} has the shape {shape}, not {expected.get(name)}"
            for name, shape in self.shapes.items()
            if expected.get(name) != shape
        ]
        if problems:
            raise UserError(f"{self.folder} does not fit its {FILE_NAME}: {problems[0]}")

    def verify(self) -> None:
        """Compare the files with checksums.json, each once per machine. Raises UserError."""
        needed = [FILE_NAME, *self.files]
        verify_checksums(contained(self.folder, CHECKSUMS), needed, cached_sha256)


def with_adapters(
    base: "Snapshot",
    folder: Path,
    where: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    verify: bool = True,
) -> "Snapshot":
    """The model that a LoRA run trained: the base with the adapters merged, for evaluation.

    base: in fp32 on the CPU, with a rank's own experts alone where ranks share them. where: its
    path, for errors. dtype: of the result's parameters. verify: hold files against checksums, and
    the base against the one that was trained on. Raises UserError if it is another.
    """
    adapters = Adapters(folder)
    if verify:
        adapters.verify()
    about, metadata = adapters.metadata, adapters.metadata.model
    there, topology = base.network.state_dict(), base.network.topology
    trained_on = f"{folder} belongs to the model {about.base.name or 'of its run'}"
    if metadata.model.blocks != base.config.model.blocks:  # before a network of so many is built
        raise UserError(
            f"{trained_on}, of {metadata.model.blocks} blocks, and {where} has "
            f"{base.config.model.blocks}; open the model that the adapters were trained on"
        )
    adapters.check()
    network = empty_network(metadata.model, metadata.moe, topology, device)
    taken = [name for name in network.state_dict() if name not in adapters.shapes]
    for name in taken:
        wanted, found = network.state_dict()[name].shape, there.get(name)
        if found is None or found.shape != wanted:
            held = "no such tensor" if found is None else f"one of {tuple(found.shape)}"
            raise UserError(
                f"{trained_on}, with {name} of {tuple(wanted)}, and {where} has {held}; open the "
                "model that the adapters were trained on"
            )
    if verify:
        own = fingerprint(taken, there.__getitem__, base.network.expert_parameters())
        first = topology.expert_rank * len(own.experts)
        wanted_experts = about.base.experts[first : first + len(own.experts)]
        if (own.sha256, own.experts) != (about.base.sha256, wanted_experts):
            raise UserError(
                f"{trained_on} (SHA-256 {about.base.sha256[:12]}), and {where} holds other weights "
                f"({own.sha256[:12]}); open the model that the adapters were trained on, in fp32"
            )

    def read(name: str, rows: slice | None) -> Tensor:
        if name in adapters.shapes:
            return adapters.read(name, rows).float()
        a, b = factor_names(name)
        if a not in adapters.shapes:
            return there[name]
        factor_a, factor_b = (adapters.read(factor, rows).float() for factor in (a, b))
        return merged(there[name], factor_a, factor_b, about.lora.scale)

    fill(network, read).requires_grad_(False)
    cast_parameters(network, dtype)
    latents = metadata.latents
    if latents.autoencoder == FOLDER:
        latents = latents.model_copy(update={"autoencoder": base.latents.autoencoder})
    return base._replace(
        network=network,
        config=metadata.config,
        latents=latents,
        class_names=metadata.class_names or (),
        clock=metadata.clock or Clock(samples=0, step=0, skipped=0),
    )
