"""Writes a source as an exported folder, atomically, and compares the result with the source."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.capacity.thresholds import store
from diffmoe.conditions import Condition, Text
from diffmoe.config import BYTES, TextConfig
from diffmoe.errors import UserError
from diffmoe.export import for_diffusers
from diffmoe.export.autoencoder_folder import (
    FOLDER,
    autoencoder_files,
    copy_autoencoder,
    local_folder,
)
from diffmoe.export.exported_model import CARD, CHECKSUMS, load_exported
from diffmoe.export.metadata import FILE_NAME, Metadata
from diffmoe.export.model_card import model_card
from diffmoe.export.sources import Source
from diffmoe.export.tensors import (
    MAX_SHARD_BYTES,
    SINGLE,
    cast_parameters,
    empty_network,
    fill,
    total_bytes,
    write_file,
    write_tensors,
)
from diffmoe.files import sync
from diffmoe.latent_spec import LatentSpec
from diffmoe.models.dit import DiT
from diffmoe.models.routing_mode import RoutingMode
from diffmoe.redaction import redact, without_folders
from diffmoe.seeding import keyed_generator


class Written(NamedTuple):
    """path: the folder. bytes: of its tensors. compared: how many predicted numbers were equal.

    notes: for the user.
    """

    path: Path
    bytes: int
    compared: int
    notes: tuple[str, ...] = ()


def write_exported(
    source: Source,
    target: Path,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    diffusers: bool = False,
) -> Written:
    """Write the source as an exported folder, load that and compare predictions bit for bit.

    An autoencoder in a local folder is copied along; no other path, and no secret of an address,
    is written. Memory: one tensor while writing, one network in fp32 while comparing.
    dtype: float32 or bfloat16. diffusers: also what diffusers opens it with (for_diffusers.py); its
    predictions are then compared, too, up to rounding. Raises UserError if the source is damaged,
    the target exists, the disk is full, or the result differs; then nothing is left of it.
    """
    if diffusers:
        for_diffusers.check(source.metadata, source.where)
    source = source.checked()
    latents = source.metadata.latents
    autoencoder = local_folder(latents.autoencoder)
    notes: tuple[str, ...] = ()
    if autoencoder is not None and not autoencoder.is_dir():
        if diffusers:
            raise UserError(
                f"the autoencoder {autoencoder} is not on this machine, and a pipeline for "
                "diffusers needs its files; put it there, or choose --to diffmoe"
            )
        notes = (
            f"warning: the autoencoder {autoencoder} is not on this machine; copy it to "
            f"{target / FOLDER}, where it is expected",
        )
        autoencoder = None
    metadata = source.metadata.replace(dtype=dtype, latents=without_places(latents).model_dump())
    kind = getattr(torch, dtype)
    size = total_bytes(source.shapes, kind)
    if autoencoder is not None:
        size += sum((autoencoder / name).stat().st_size for name in autoencoder_files(autoencoder))
    with new_folder(target, size) as temporary:
        home, single = temporary, SINGLE
        if diffusers:
            home, single = temporary / for_diffusers.TRANSFORMER, for_diffusers.WEIGHTS
            home.mkdir()
        tensors = write_tensors(home, source.shapes, source.read, kind, max_shard_bytes, single)
        files = {(home / name).relative_to(temporary).as_posix(): tensors[name] for name in tensors}
        if autoencoder is not None:
            files |= copy_autoencoder(autoencoder, temporary)
        if diffusers:
            files |= for_diffusers.write_parts(temporary, metadata, source.thresholds)
        text = json.dumps(metadata.model_dump(mode="json"), indent=1)
        files[FILE_NAME] = write_file(temporary / FILE_NAME, [text.encode()])
        for name, entry in source.thresholds.items():
            store(temporary, name, entry)
        card = model_card(metadata, source.shapes, sorted(source.thresholds), source.run, diffusers)
        write_file(temporary / CARD, [card.encode()])
        write_file(temporary / CHECKSUMS, [json.dumps({"files": files}, indent=1).encode()])
        compared, largest = _compare(source, temporary, kind, diffusers)
    if diffusers:
        notes += (_difference_note(largest),)
    return Written(target, total_bytes(source.shapes, kind), compared, notes)


def without_places(latents: LatentSpec) -> LatentSpec:
    """As an exported folder has them: no path of this machine, and no secret of an address."""
    stored_as = {"source": redact(without_folders(latents.source))}
    if local_folder(latents.autoencoder) is not None:
        stored_as["autoencoder"] = FOLDER
    return latents.model_copy(update=stored_as)


@contextlib.contextmanager
def new_folder(target: Path, needed: int = 0) -> Iterator[Path]:
    """A temporary folder, renamed to `target` at the end, or removed if an error occurs.

    needed: bytes that must be free. Raises UserError if the target exists, and for OSErrors.
    """
    with _new(target, needed) as temporary:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)


@contextlib.contextmanager
def new_file(target: Path, needed: int = 0) -> Iterator[Path]:
    """As `new_folder`, for a file."""
    with _new(target, needed) as temporary:
        yield temporary


@contextlib.contextmanager
def _new(target: Path, needed: int) -> Iterator[Path]:
    refuse_existing(target)
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        _remove(temporary)
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if needed > free:
            raise UserError(
                f"{target} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there; free "
                "space or choose another place"
            )
        yield temporary
        refuse_existing(target)
        sync(temporary)
        temporary.rename(target)
        sync(target.parent)
    except OSError as error:
        raise UserError(f"{target} was not written: {error.strerror or error}") from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def refuse_existing(target: Path) -> None:
    """Raise UserError if the target exists."""
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; choose another name, or remove it first")


def _compare(
    source: Source, folder: Path, kind: torch.dtype, diffusers: bool
) -> tuple[int, float | None]:
    """Compare the fp32 predictions of the source and of what was written. Returns how many.

    And the largest difference of diffusers' predictions, if asked for and if it is installed.
    Raises UserError unless ours are equal bit for bit, and diffusers' up to rounding.
    """
    metadata = source.metadata
    network = empty_network(metadata.model, metadata.moe)
    fill(network, lambda name, _: source.read(name))
    cast_parameters(network, kind)
    cast_parameters(network, torch.float32)
    expected = probe(network, metadata)
    del network
    found = probe(load_exported(folder, verify=False)[0], metadata)
    for (routing, a), b in zip(expected.items(), found.values(), strict=True):
        if not torch.equal(a, b):
            largest = float((a - b).abs().max())
            raise UserError(
                f"{source.where}: the written model's output ({routing}) differs from the source's "
                f"by up to {largest:.3g}; nothing was kept. Check the disk"
            )
    theirs = None
    if diffusers:
        ours = expected[metadata.moe.inference]
        theirs = for_diffusers.difference(folder, _probe_inputs(metadata), ours, source.where)
    return sum(output.numel() for output in expected.values()), theirs


def _difference_note(largest: float | None) -> str:
    if largest is None:
        return "diffusers is not installed: what it computes of the folder was not compared"
    return f"what diffusers computes of the folder differs by up to {largest:.1g}"


@torch.inference_mode()
def probe(network: DiT, metadata: Metadata) -> dict[str, Tensor]:
    """Predictions for two fixed inputs, with the routing of the model and with static routing.

    The second input has the null label or caption. Returns {routing: (2, C or 2C, H, W)}.
    """
    x, t, condition = _probe_inputs(metadata)
    outputs: dict[str, Tensor] = {metadata.moe.inference: network(x, t, condition).prediction}
    if network.routing is not None:
        with network.routed(RoutingMode("static")):
            outputs["static"] = network(x, t, condition).prediction
    return outputs


def _probe_inputs(metadata: Metadata) -> tuple[Tensor, Tensor, Condition]:
    """x, t and condition of two samples, of which the second has the null label or caption."""
    model, flow = metadata.model, metadata.diffusion.objective == "flow"
    shape = (2, *model.latent_shape)
    x = torch.randn(shape, generator=keyed_generator("conversion probe"))
    t = torch.tensor([0.3, 0.8]) if flow else torch.tensor([250.0, 800.0])
    condition: Condition = torch.tensor([0, model.num_classes])
    if model.text is not None:
        condition = _probe_text(model.text)
    return x, t, condition


def _probe_text(text: TextConfig) -> Text:
    """Two captions: one with padding behind it, and the null caption."""
    generator, positions = keyed_generator("conversion probe text"), (2, text.length)
    if text.encoder == BYTES:
        tokens = torch.randint(256, positions, generator=generator)
    else:
        tokens = torch.randn(*positions, text.width, generator=generator)
    pooled = torch.randn(2, text.pooled, generator=generator) if text.pooled else None
    lengths_B1 = torch.tensor([[text.length - text.length // 3], [0]])
    return Text(tokens, torch.arange(text.length) < lengths_B1, pooled)
