"""A source becomes an exported folder: whole or not at all, and held against the source."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffmoe.capacity.thresholds import store
from diffmoe.conditions import Text
from diffmoe.config import BYTES, TextConfig
from diffmoe.errors import UserError
from diffmoe.export.autoencoder_folder import (
    FOLDER,
    autoencoder_files,
    copy_autoencoder,
    local_folder,
)
from diffmoe.export.exported import CARD, CHECKSUMS, load_exported
from diffmoe.export.metadata import FILE_NAME, Metadata
from diffmoe.export.model_card import model_card
from diffmoe.export.sources import Source
from diffmoe.export.tensors import (
    MAX_SHARD_BYTES,
    cast_parameters,
    empty_network,
    fill,
    total_bytes,
    write_file,
    write_tensors,
)
from diffmoe.files import sync
from diffmoe.models.dit import DiT
from diffmoe.models.routing_mode import RoutingMode
from diffmoe.redaction import redact, without_folders
from diffmoe.seeding import keyed_generator


class Written(NamedTuple):
    """path: the folder. bytes: of its tensors. compared: numbers of the forwards that agreed.

    notes: what its user should know.
    """

    path: Path
    bytes: int
    compared: int
    notes: tuple[str, ...] = ()


def write_exported(
    source: Source, target: Path, dtype: str = "float32", max_shard_bytes: int = MAX_SHARD_BYTES
) -> Written:
    """Write the source as an exported folder, load that again and compare forwards bit for bit.

    An autoencoder that is a folder of this machine comes along; no other path, and no secret of an
    address, is written. Memory: while writing one tensor, while comparing one network, in fp32.
    Raises UserError where the source is not sound, the target exists, the disk is full, or the
    result differs; then nothing of it stays.
    """
    source = source.checked()
    latents = source.about.latents
    autoencoder, notes = local_folder(latents.autoencoder), ()
    shown: dict[str, str] = {"source": redact(without_folders(latents.source))}
    if autoencoder is not None:
        shown["autoencoder"] = FOLDER
    if autoencoder is not None and not autoencoder.is_dir():
        notes = (
            f"warning: the autoencoder {autoencoder} is not on this machine; copy it to "
            f"{target / FOLDER}, where the model looks for it",
        )
        autoencoder = None
    about = source.about.replace(dtype=dtype, latents=latents.model_copy(update=shown).model_dump())
    kind = getattr(torch, dtype)
    size = total_bytes(source.shapes, kind)
    if autoencoder is not None:
        size += sum((autoencoder / name).stat().st_size for name in autoencoder_files(autoencoder))
    with new_folder(target, size) as torn:
        files = write_tensors(torn, source.shapes, source.read, kind, max_shard_bytes)
        if autoencoder is not None:
            files |= copy_autoencoder(autoencoder, torn)
        text = json.dumps(about.model_dump(mode="json"), indent=1)
        files[FILE_NAME] = write_file(torn / FILE_NAME, [text.encode()])
        for name, entry in source.thresholds.items():
            store(torn, name, entry)
        card = model_card(about, source.shapes, sorted(source.thresholds), source.run)
        write_file(torn / CARD, [card.encode()])
        write_file(torn / CHECKSUMS, [json.dumps({"files": files}, indent=1).encode()])
        compared = _compare(source, torn, kind)
    return Written(target, total_bytes(source.shapes, kind), compared, notes)


@contextlib.contextmanager
def new_folder(target: Path, needed: int = 0) -> Iterator[Path]:
    """A hidden folder that gets the name `target` when all went well, else is removed.

    needed: bytes that must be free. Raises UserError where the target exists, and for OSErrors.
    """
    with _new(target, needed) as torn:
        torn.mkdir()
        yield torn
        for file in torn.rglob("*"):
            sync(file)


@contextlib.contextmanager
def new_file(target: Path, needed: int = 0) -> Iterator[Path]:
    """The same for a file."""
    with _new(target, needed) as torn:
        yield torn


@contextlib.contextmanager
def _new(target: Path, needed: int) -> Iterator[Path]:
    refuse_existing(target)
    torn = target.with_name(f".{target.name}.tmp")
    try:
        _remove(torn)
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if needed > free:
            raise UserError(
                f"{target} needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free there; free "
                "space or choose another place"
            )
        yield torn
        refuse_existing(target)
        sync(torn)
        torn.rename(target)
        sync(target.parent)
    except OSError as error:
        raise UserError(f"{target} was not written: {error.strerror or error}") from error
    finally:
        _remove(torn)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise UserError(f"{target} exists; choose another name, or remove it first")


def _compare(source: Source, folder: Path, kind: torch.dtype) -> int:
    """Forward passes of the source and of what was written, equal bit for bit, in fp32."""
    about = source.about
    network = empty_network(about.model, about.moe)
    fill(network, lambda name, _: source.read(name))
    cast_parameters(network, kind)
    cast_parameters(network, torch.float32)
    expected = probe(network, about)
    del network
    found = probe(load_exported(folder, verify=False)[0], about)
    for (how, a), b in zip(expected.items(), found.values(), strict=True):
        if not torch.equal(a, b):
            largest = float((a - b).abs().max())
            raise UserError(
                f"{source.where}: the written model's output ({how}) differs from the source's by "
                f"up to {largest:.3g}; nothing was kept. Is the disk sound?"
            )
    return sum(output.numel() for output in expected.values())


@torch.inference_mode()
def probe(network: DiT, about: Metadata) -> dict[str, Tensor]:
    """Predictions for two fixed inputs, routed as the model is set, and with all experts at work.

    The second input has the null label, or no caption. -> {how it was routed: (2, C or 2C, H, W)}.
    """
    model, flow = about.model, about.diffusion.objective == "flow"
    shape = (2, model.in_channels, model.input_size, model.input_size)
    x = torch.randn(shape, generator=keyed_generator("conversion probe"))
    t = torch.tensor([0.3, 0.8]) if flow else torch.tensor([250.0, 800.0])
    condition = torch.tensor([0, model.num_classes])
    if model.text is not None:
        condition = _probe_text(model.text)
    outputs = {about.moe.inference: network(x, t, condition).prediction}
    if network.routing is not None:
        with network.routed(RoutingMode("static")):
            outputs["static"] = network(x, t, condition).prediction
    return outputs


def _probe_text(text: TextConfig) -> Text:
    """Two captions, of all places and of none."""
    generator, places = keyed_generator("conversion probe text"), (2, text.length)
    if text.encoder == BYTES:
        tokens = torch.randint(256, places, generator=generator)
    else:
        tokens = torch.randn(*places, text.width, generator=generator)
    pooled = torch.randn(2, text.pooled, generator=generator) if text.pooled else None
    return Text(tokens, torch.tensor([[True], [False]]).expand(places), pooled)
