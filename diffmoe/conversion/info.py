"""What a path holds, in a few lines: kind, sizes, parameters, samples seen, thresholds."""

from collections.abc import Callable, Iterator
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
from diffmoe.export.exported import ExportedModel, is_exported
from diffmoe.export.model_card import conditioning, family, parameter_counts
from diffmoe.export.tensors import Shapes

Lines = dict[str, str]


def info(path: Path) -> Lines:
    """By what it is about, one line each. Raises UserError where the path holds no model."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if is_exported(path):
        return _exported(path)
    if path.is_file():
        return _state_dict(path)
    folder = transformer_folder(path)
    if folder is not None:
        with foreign_source(path) as source:
            about = source.about
            return {
                "kind": "folder of diffusers' DiTTransformer2DModel",
                **_network(about.model, about.moe, source.shapes, source.read),
                "on disk": _size(folder),
            }
    return _checkpoint(find_complete(path))


def _exported(path: Path) -> Lines:
    model = ExportedModel(path)
    about = model.about
    made = about.provenance
    return {
        "kind": f"exported model, {about.dtype}",
        **_network(about.model, about.moe, model.shapes, model.read),
        "objective": about.diffusion.objective,
        "latents": f"{about.latents.autoencoder}, scale {about.latents.scale}",
        "weights": about.weights,
        "samples seen": f"{about.clock.samples:,}" if about.clock else "unknown",
        "made from": "; ".join((f"{made.kind} {made.name}", *made.steps)),
        "calibrated": ", ".join(sorted(stored(path))) or "nothing",
        "on disk": _size(path),
        "checksums": f"all {model.verify()} files are as they were written",
    }


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
    """Of a .pt file; what its tensors do not show, such as heads and objective, stays unsaid."""
    found = {state.entry: state for state in _entries(path)}
    lines: Lines = {}
    for entry, state in found.items():
        options = _assumed({name: tuple(t.shape) for name, t in state.tensors.items()})
        with foreign_source(path, state.weights, options=options) as source:
            about = source.about
            told = _network(about.model, about.moe, source.shapes, source.read)
            rows = about.model.num_classes + 1
            told["labels"] = f"{rows} rows, of classes and, if labels were dropped, the null one"
            told["thresholds" + (f" of {entry}" if entry else "")] = told.pop("thresholds", "none")
            names = "DiT or SiT" if about.moe.type == "dense" else "the DiffMoE release"
            lines |= {"kind": f"state dict in the names of {names}", **told}
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
    """Stands in for what is not shown, and is not told."""
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
        "network": f"{family(moe)}; {model.depth} blocks of width {model.width}, patch "
        f"{model.patch_size}, {conditioning(model)}",
        "parameters": f"{total:,}, of which {active:,.0f} work on an average token"
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
