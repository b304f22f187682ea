"""Writes a network as a program of torch.export or ONNX, with a sampler that needs no diffmoe.

network.pt2     torch.export's, read by torch alone; or network.onnx, read by onnxruntime
sample.py       a copy of export/standalone.py: reads it, and draws images

What is known about the network (`_about`) is stored inside of network.pt2 and network.onnx.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffmoe.config import MoEConfig
from diffmoe.errors import UserError
from diffmoe.export import standalone
from diffmoe.export.autoencoder_folder import local_folder
from diffmoe.export.metadata import Metadata
from diffmoe.export.sources import Source
from diffmoe.export.tensors import empty_network, fill, total_bytes
from diffmoe.export.writing import new_folder
from diffmoe.models.dit import DiT
from diffmoe.models.routing import expert_capacity
from diffmoe.models.routing_mode import RoutingMode, check_capacity
from diffmoe.redaction import redact, without_folders
from diffmoe.seeding import keyed_generator

Form = Literal["pt2", "onnx"]
FORMS: tuple[Form, ...] = ("pt2", "onnx")
SAMPLER = "sample.py"
_INPUTS = ("x", "t", "labels")
# Where the batch's size alone says how many tokens an expert takes.
_STATIC = ("dense", "diffmoe", "race", "expert_choice")
_LARGEST_BATCH = 4096  # for which "release" is compared with "exact"


class _Prediction(nn.Module):
    """(x, t, labels) -> prediction, and nothing of the routing."""

    def __init__(self, network: DiT) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.network(x, t, labels).prediction


def write_program(
    source: Source,
    target: Path,
    form: Form = "pt2",
    dtype: str = "float32",
    capacity: float | None = None,
) -> tuple[str, ...]:
    """Write the source as a folder of network.pt2 or network.onnx and sample.py.

    The number of images stays open. Thresholds do not route, since shapes would depend on data: it
    is static routing (RoutingMode), as `--routing static` of tools/sample.py.
    dtype: float32 or bfloat16, of the parameters. capacity: C of static routing; None: of training.
    The written network is opened again and compared: bit for bit, of ONNX up to rounding. Memory:
    two networks. Returns notes for the user. Raises UserError for a network that neither format can
    represent, before any work; else as write_exported.
    """
    source = source.checked()
    metadata, where = source.metadata, source.where
    moe = _static(metadata, where, form, dtype, capacity)
    kind = getattr(torch, dtype)
    with new_folder(target, total_bytes(source.shapes, kind)) as temporary:
        network = empty_network(metadata.model, moe, dtype=kind)
        fill(network, lambda name, _: source.read(name)).requires_grad_(False)
        if network.has_thresholds:
            network.routing = RoutingMode("static", capacity)
        file = temporary / f"network.{form}"
        _write(network, file, json.dumps(_about(metadata, network, dtype), indent=1))
        shutil.copyfile(standalone.__file__, temporary / SAMPLER)
        note = _compare(network, file, where)
    notes = [note, f"draw images, without diffmoe: python {target / SAMPLER} --out images.png"]
    if network.shares_compute:
        notes.append(
            "static routing: every expert takes its share of a batch's tokens, so an image depends "
            "on the rest of its batch; compare with tools/sample.py --routing static"
        )
    return tuple(notes)


def _static(
    metadata: Metadata, where: str, form: Form, dtype: str, capacity: float | None
) -> MoEConfig:
    """The settings of the MoE layers to export. Raises UserError for what cannot be."""
    model, moe = metadata.model, metadata.moe
    if model.text is not None:
        raise UserError(
            f"{where} is text-conditioned, {form} supports only classes; choose --to diffmoe"
        )
    if moe.type not in _STATIC or (form == "onnx" and moe.type == "race"):
        way_out = "pt2" if moe.type in _STATIC else "diffmoe"
        raise UserError(
            f"{where}: moe.type={moe.type} has shapes that depend on data, which {form} cannot "
            f"hold; choose --to {way_out}"
        )
    if capacity is not None:
        if moe.type not in ("diffmoe", "race"):
            raise UserError(
                f"capacity {capacity:g}: a {moe.type} model has no capacity to choose; leave it out"
            )
        check_capacity(capacity, moe.experts)
    if form == "onnx":
        if dtype != "float32":
            raise UserError(f"--dtype {dtype}: onnxruntime computes in float32; choose that")
        missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if find_spec(n) is None]
        if missing:
            raise UserError(
                f'{missing[0]} is not installed, which --to onnx needs: pip install "diffmoe[onnx]"'
            )
    if moe.capacity_rounding == "exact" or moe.type == "dense":
        return moe
    # The release counts tokens in floats, which torch.export would fix for one size of batch.
    C = moe.capacity if capacity is None else capacity
    rows, columns = model.grid
    counted = rows * columns * (moe.experts if moe.type == "race" else 1)
    for batch in range(1, _LARGEST_BATCH + 1):
        tokens = batch * counted
        if expert_capacity(tokens, moe.experts, C) != expert_capacity(
            tokens, moe.experts, C, "release"
        ):
            raise UserError(
                f"{where}: moe.capacity_rounding=release at capacity {C:g} rounds in a way that "
                f"{form} cannot hold; choose another --capacity, such as 1"
            )
    return moe.model_copy(update={"capacity_rounding": "exact"})


def _write(network: DiT, file: Path, about: str) -> None:
    batch = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        program = torch.export.export(
            _Prediction(network), _inputs(network, 2), dynamic_shapes=({0: batch},) * 3
        )
    if file.suffix == ".pt2":
        torch.export.save(program, file, extra_files={standalone.ABOUT: about})
        return
    with _without_asides():
        converted = torch.onnx.export(
            program, dynamo=True, input_names=_INPUTS, output_names=["prediction"], verbose=False
        )
    assert converted is not None
    converted.model.metadata_props[standalone.ABOUT] = about
    converted.save(file)


@contextmanager
def _without_asides() -> Iterator[None]:
    """torch.onnx's exporter says that torchvision is missing, and that torch itself is outdated."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec. is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _inputs(network: DiT, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random latents, times and labels, the null label among them."""
    generator = keyed_generator("program probe", batch)
    x = torch.randn(batch, *network.config.latent_shape, generator=generator)
    labels = torch.arange(batch) % (network.config.num_classes + 1)
    return x, torch.rand(batch, generator=generator), labels.flip(0)


@torch.inference_mode()
def _compare(network: DiT, file: Path, where: str) -> str:
    """Compare predictions for two sizes of batch with what was written. Returns a note.

    Raises UserError where they differ.
    """
    written, _ = standalone.load(file)
    number, largest, share = 0, 0.0, 0.0
    for batch in (1, 3):
        given = _inputs(network, batch)
        expected, found = network(*given).prediction, written(*given)
        number += expected.numel()
        largest = max(largest, float((found - expected).abs().max()))
        share = max(share, float((found - expected).norm() / expected.norm().clamp(min=1e-12)))
    # onnxruntime rounds otherwise; a token between two experts may then go to the other.
    if share > (0 if file.suffix == ".pt2" else 1e-2):
        raise UserError(
            f"{where}: the output of the written {file.name} differs from the source's by up to "
            f"{largest:.3g}; nothing was kept. Please report it with the versions of torch and onnx"
        )
    if largest == 0:
        return f"{number} predicted numbers equal the source's bit for bit"
    return f"{number} predicted numbers differ from the source's by up to {largest:.1e}"


def _about(metadata: Metadata, network: DiT, dtype: str) -> dict[str, Any]:
    """What a caller has to know: standalone.py reads it, and no other code is needed."""
    config, latents, mode = metadata.config, metadata.latents, network.routing
    flow = config.diffusion.objective == "flow"
    return {
        "inputs": "x (B, C, H, W) float32, t (B,) float32, labels (B,) int64",
        "shape": list(metadata.model.latent_shape),
        "num_classes": metadata.model.num_classes,
        "null_label": metadata.model.num_classes,
        "class_names": metadata.class_names and list(metadata.class_names),
        "can_guide": config.training.label_dropout > 0,
        "objective": config.diffusion.objective,
        "t": "0 is noise, 1 is data" if flow else "0 to 999, 999 is noise",
        "x_t": "t * data + (1 - t) * noise"
        if flow
        else "sqrt(abar_t) * data + sqrt(1 - abar_t) * noise, abar the product of 1 - beta",
        "prediction": "data - noise" if flow else "noise",
        "more_channels": "unused"
        if flow
        else "log variance: -1 is the posterior's, 1 that of beta (arXiv 2102.09672, Eq. 15)",
        "shift": config.timestep_shift,
        "betas": None if flow else {"first": 1e-4, "last": 0.02, "steps": 1000},
        "latents": {
            **latents.model_dump(mode="json"),
            # No path of this machine.
            "autoencoder": Path(latents.autoencoder).name
            if local_folder(latents.autoencoder)
            else latents.autoencoder,
            "source": redact(without_folders(latents.source)),
        },
        "family": metadata.moe.type,
        "routing": mode and mode.kind,
        "capacity": mode and (mode.capacity or metadata.moe.capacity),
        "dtype": dtype,
        "weights": metadata.weights,
        "samples_seen": metadata.clock and metadata.clock.samples,
        "provenance": metadata.provenance.model_dump(mode="json"),
        "torch": torch.__version__,
    }
