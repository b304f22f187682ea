"""Describes the model at a path: kind, size, parameters, samples seen, thresholds."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffmoe.capacity.thresholds import stored
from diffmoe.checkpoints.folder import find_complete
from diffmoe.checkpoints.inspect import open_checkpoint
from diffmoe.config import ModelConfig, MoEConfig
from diffmoe.conversion.foreign import Options, foreign_source
from diffmoe.conversion.hugging_face import transformer_folder
from diffmoe.conversion.release import label_rows
from diffmoe.conversion.state_dicts import StateDict, load_state
from diffmoe.errors import UserError
from diffmoe.export.exported_model import ExportedModel, is_exported
from diffmoe.export.model_card import blocks, conditioning, family, parameter_counts
from diffmoe.export.tensors import Shapes
from diffmoe.files import does_not_exist

Lines = dict[str, str]


def info(path: Path) -> Lines:
    """Facts by their names. Raises UserError if the path holds no model."""
    if not path.exists():
        raise UserError(does_not_exist(path))
    if is_exported(path):
        return _exported(path)
    if path.is_file():
        return _state_dict(path)
    folder = transformer_folder(path)
    if folder is not None:
        with foreign_source(path) as source:
            metadata = source.metadata
            return {
                "kind": "folder of diffusers' DiTTransformer2DModel",
                **_network(metadata.model, metadata.moe, source.shapes, source.read),
                "on disk": _size(folder),
            }
    return _checkpoint(find_complete(path))


def _exported(path: Path) -> Lines:
    model = ExportedModel(path)
    metadata = model.metadata
    made = metadata.provenance
    return {
        "kind": f"exported model, {metadata.dtype}",
        **_network(metadata.model, metadata.moe, model.shapes, model.read),
        **_classes(metadata.class_names),
        "objective": metadata.diffusion.objective,
        "latents": f"{metadata.latents.autoencoder}, scale {metadata.latents.scale}",
        "weights": metadata.weights,
        "samples seen": f"{metadata.clock.samples:,}" if metadata.clock else "unknown",
        "made from": "; ".join((f"{made.kind} {made.name}", *made.steps)),
        "calibrated": ", ".join(sorted(stored(path))) or "nothing",
        "on disk": _size(path),
        "checksums": f"all {model.verify()} files agree with theirs",
    }


def _classes(names: Sequence[str] | None) -> Lines:
    return {"classes": ", ".join(names)} if names else {}


def _checkpoint(path: Path) -> Lines:
    with open_checkpoint(path) as checkpoint:
        config, record = checkpoint.config, checkpoint.record
        latents = record.latents
        there = checkpoint.prefixes
        prefix = "weights" if "weights" in there else there[0]
        shapes = {
            name.partition("/")[2]: shape
            for name, shape in checkpoint.shapes.items()
            if name.partition("/")[0] in (prefix, "buffers")
        }

        def read(name: str) -> Tensor:
            return checkpoint.read(f"buffers/{name}")

        return {
            "kind": f"training checkpoint {path}",
            **_network(config.model, config.moe, shapes, read),
            **_classes(latents.get("class_names")),
            "objective": config.diffusion.objective,
            "latents": f"{latents.get('autoencoder')}, scale {latents.get('scale')}",
            "weights": ", ".join(p for p in there if not p.startswith(("exp_", "buffers"))),
            "samples seen": f"{record.clock.samples:,} in {record.clock.step} steps",
            "saved by": f"{record.saved_by.world} ranks, expert_parallel="
            f"{config.parallel.expert_parallel}, zero_stage={config.parallel.zero_stage}",
            "calibrated": ", ".join(sorted(stored(path))) or "nothing",
            "on disk": _size(path),
        }


def _state_dict(path: Path) -> Lines:
    """Of a .pt file. What its tensors do not show, such as heads and objective, is left out."""
    found = {state.entry: state for state in _entries(path)}
    lines: Lines = {}
    for entry, state in found.items():
        options = _assumed({name: tuple(t.shape) for name, t in state.tensors.items()})
        with foreign_source(path, state.weights, options=options) as source:
            metadata = source.metadata
            entry_lines = _network(metadata.model, metadata.moe, source.shapes, source.read)
            rows = metadata.model.num_classes + 1
            entry_lines["labels"] = f"{rows} rows: classes, and with label dropout the null label"
            thresholds = entry_lines.pop("thresholds", "none")
            entry_lines["thresholds" + (f" of {entry}" if entry else "")] = thresholds
            names = "DiT or SiT" if metadata.moe.type == "dense" else "the DiffMoE release"
            lines |= {"kind": f"state dict with the names of {names}", **entry_lines}
    entries = ", ".join(entry or "a plain state dict" for entry in found)
    return lines | {"entries": entries, "on disk": _size(path)}


def _entries(path: Path) -> Iterator[StateDict]:
    problems = []
    for weights in ("ema", "live"):
        try:
            yield load_state(path, weights)
        except UserError as error:
            problems.append(error)
    if len(problems) == 2:
        raise problems[0]


def _assumed(shapes: Shapes) -> Options:
    """Placeholders for what the tensors do not show; they do not appear in the output."""
    patches = shapes.get("x_embedder.proj.weight", ())
    return Options(
        objective="flow",
        heads=1,
        num_classes=max(1, label_rows(shapes) - 1),
        input_size=None if "pos_embed" in shapes else patches[-1] if patches else None,
    )


def _network(
    model: ModelConfig, moe: MoEConfig, shapes: Shapes, read: Callable[[str], Tensor]
) -> Lines:
    total, active = parameter_counts(shapes, moe)
    lines = {
        "network": f"{family(moe)}; {blocks(model)}, patch {model.patch_size}, "
        f"{conditioning(model)}",
        "parameters": f"{total:,}, of which {active:,.0f} are active for an average token"
        + (f" at capacity {moe.capacity:g}" if moe.type != "dense" else ""),
    }
    names = [name for name in shapes if name.endswith(".thresholds")]
    if names:
        values = torch.stack([read(name) for name in names])
        lines["thresholds"] = (
            f"{values.min():.4f} to {values.max():.4f}, mean {values.mean():.4f}, of "
            f"{values.shape[0]} layers with {values.shape[1]} experts"
        )
    return lines


def _size(path: Path) -> str:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return f"{sum(file.stat().st_size for file in files) / 1e6:,.2f} MB in {len(files)} files"
