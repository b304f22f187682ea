"""Reads other projects' files as sources, and writes sources as their files."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffmoe.conversion import hugging_face
from diffmoe.conversion.difference import describe, measure_difference, readme
from diffmoe.conversion.downloads import check_downloads
from diffmoe.conversion.layouts import check_foreign_state_dict, reader, translated
from diffmoe.conversion.release import (
    is_derived,
    label_rows,
    release_layout,
    sections_from_shapes,
)
from diffmoe.conversion.state_dicts import StateDict, load_state
from diffmoe.data.autoencoders import canonical_name
from diffmoe.errors import UserError
from diffmoe.export.autoencoder_folder import (
    autoencoder_files,
    copy_autoencoder,
    local_folder,
    read_autoencoder_config,
)
from diffmoe.export.exported_model import CARD, CHECKSUMS
from diffmoe.export.for_diffusers import WEIGHTS
from diffmoe.export.metadata import Metadata, parse_metadata
from diffmoe.export.sources import Source
from diffmoe.export.stored_tensors import StoredTensors, verify_checksums
from diffmoe.export.tensors import Shapes, expected_shapes
from diffmoe.export.writing import new_file, new_folder
from diffmoe.files import sha256_of
from diffmoe.models.blocks import grid_positions

Format = Literal["release", "dit", "sit", "diffusers"]
FORMATS: tuple[Format, ...] = ("release", "dit", "sit", "diffusers")
_OBJECTIVES = {"dit": "ddpm", "diffusers": "ddpm", "sit": "flow"}
# LatentSpec of the published models: Stable Diffusion's f8 autoencoder.
AUTOENCODER, SCALE = "stabilityai/sd-vae-ft-ema", 0.18215


@dataclass(frozen=True)
class Options:
    """What foreign files may not contain. None: derived, else an error that names the flag.

    objective: flow or ddpm. heads: of attention. num_classes: without the null label. capacity,
    top_k: of training. autoencoder, scale: of the latents; None: a pipeline's own vae/, else Stable
    Diffusion's if there are 4 channels, else pixels.
    """

    objective: str | None = None
    heads: int | None = None
    input_size: int | None = None
    num_classes: int | None = None
    capacity: float = 1.0
    top_k: int = 1
    autoencoder: str | None = None
    scale: float | None = None


@contextlib.contextmanager
def foreign_source(
    path: Path, weights: str = "ema", form: Format | None = None, options: Options | None = None
) -> Iterator[Source]:
    """A .pt file of the release, DiT or SiT, or a folder of diffusers, as a source.

    weights: ema or live, the entry of a .pt file. form: None: detected. The notes report what was
    detected, and warnings. Raises UserError if a tensor is missing, unexpected or of another shape,
    or the options do not fit.
    """
    options = options or Options()
    if path.is_dir():
        yield _diffusers(path, form, options)
    else:
        yield _release(path, load_state(path, weights), form, options)


def _diffusers(path: Path, form: Format | None, options: Options) -> Source:
    folder = hugging_face.transformer_folder(path)
    if folder is None or form not in (None, "diffusers"):
        raise UserError(
            f"{path} is not a folder of a {hugging_face.CLASS}"
            + (f", and --format {form} takes a file" if form not in (None, "diffusers") else "")
        )
    stored = StoredTensors(folder, WEIGHTS)
    if (folder / CHECKSUMS).exists():
        verify_checksums(folder / CHECKSUMS, stored.files, sha256_of)
    check_downloads(folder, stored.files)
    sections = hugging_face.read_sections(folder)
    notes = [f"{path} is a {hugging_face.CLASS} of diffusers", hugging_face.DIFFERENCE]
    names, rows = None, sections[0]["num_classes"] + 1
    if (path / hugging_face.INDEX).exists():
        names = hugging_face.class_names(path, sections[0]["num_classes"])
        sections[0]["num_classes"] = len(names) if names else rows - 1
        if options.objective is None:
            scheduler = hugging_face.check_scheduler(path)
            notes.append(f"its scheduler is {scheduler}; here --sampler ddpm or ddim")
        if options.autoencoder is None and (path / "vae").is_dir():
            options = replace(options, autoencoder=str(path / "vae"))
    metadata = _metadata(folder / "config.json", sections, options, "ema", "ddpm")
    metadata = metadata.replace(
        provenance={"kind": "diffusers folder", "name": path.resolve().name}, class_names=names
    )
    notes.append(
        f"its autoencoder is {metadata.latents.autoencoder}, scale {metadata.latents.scale}"
    )
    _check_counts(metadata, stored.shapes, path)
    layout = hugging_face.diffusers_layout(metadata.model, metadata.moe, rows)
    shapes = expected_shapes(metadata.model, metadata.moe)
    check_foreign_state_dict(stored.shapes, layout, shapes, str(folder))
    read = reader(layout, stored.read, str(folder))
    return Source(str(path), metadata, shapes, read, notes=tuple(notes))


def _release(path: Path, state: StateDict, form: Format | None, options: Options) -> Source:
    tensors = state.tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    mixture = any(".mlp.experts." in name for name in shapes)
    if form == "diffusers" or (form in ("dit", "sit") and mixture):
        raise UserError(f"{path} is not a file of --format {form}" + (": it has experts" * mixture))
    if form is None and mixture:
        form = "release"
    objective = options.objective or _OBJECTIVES.get(form or "")
    if objective is None:
        names = "the release's" if mixture else "those of DiT (ddpm), SiT (flow) and the release"
        raise UserError(
            f"{path}: the names are {names}, which do not show the objective; give --format dit, "
            "--format sit, or --objective flow|ddpm"
        )
    try:
        sections = sections_from_shapes(
            shapes,
            options.num_classes or state.num_classes,
            options.heads,
            options.input_size,
            options.capacity,
            options.top_k,
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    rows, classes = label_rows(shapes), sections[0]["num_classes"]
    decay = next((t for name, t in tensors.items() if name.endswith(".mlp.ema_decay")), None)
    if decay is not None and decay.numel() == 1:
        sections[1]["threshold_ema"] = round(float(decay), 6)
    metadata = _metadata(path, sections, options, state.weights, objective)
    metadata = metadata.replace(
        provenance={
            "kind": f"{form or 'DiT or SiT'} file",
            "name": path.name,
            "sha256": sha256_of(path),
        },
        label_dropout=0.0 if classes == rows else None,
    )
    _check_counts(metadata, shapes, path)
    layout = release_layout(metadata.model, metadata.moe, null_row=classes < rows)
    ours = expected_shapes(metadata.model, metadata.moe)
    stored = {name: shape for name, shape in shapes.items() if not is_derived(name)}
    check_foreign_state_dict(stored, layout, ours, str(path))
    _check_positions(path, tensors, metadata)
    entry = f"its entry {state.entry!r}" if state.entry else "a plain state dict"
    names = "the release" if mixture else "DiT and SiT"
    notes = [f"{path} has the names of {names}; {entry}; {classes} classes", *state.notes]
    if classes == rows:
        notes.append(
            "the label table has no row for the null label: the model was trained without label "
            "dropout, and cannot be guided"
        )
    if options.heads is None:
        notes.append(
            f"{metadata.model.heads} attention heads, as published models of width "
            f"{metadata.model.width} have; the tensors do not show it (the release's example of S "
            "has 16): --heads N"
        )
    if metadata.moe.type == "diffmoe" and state.weights == "ema":
        notes.append(
            "warning: the release averages thresholds like weights, so those of its `ema` entry "
            "may be far too low (0.056 instead of 0.600 after 1,000 steps), and experts take too "
            "many tokens; they are converted unchanged. Calibrate: python tools/calibrate.py "
            "FOLDER --capacity 1"
        )
    return Source(
        str(path),
        metadata,
        ours,
        reader(layout, tensors.__getitem__, str(path)),
        notes=tuple(notes),
    )


def _metadata(
    where: Path,
    sections: tuple[dict[str, Any], dict[str, Any]],
    options: Options,
    weights: str,
    objective: str,
) -> Metadata:
    model, moe = sections
    size, channels = model["input_size"], model["in_channels"]
    latents: dict[str, Any] = {"shape": (channels, size, size)}
    if channels == 4 or options.autoencoder is not None:
        latents |= _autoencoder(options, channels)
    values = {
        "weights": weights,
        "model": model,
        "moe": moe,
        "diffusion": {"objective": options.objective or objective},
        "latents": latents,
        "provenance": {"kind": "foreign", "name": where.name},
    }
    return parse_metadata(values, where)


def _autoencoder(options: Options, channels: int) -> dict[str, Any]:
    """Fields of a LatentSpec. Raises UserError for an autoencoder of other latents."""
    name = canonical_name(options.autoencoder or AUTOENCODER)
    folder, scale = local_folder(name), SCALE
    if folder is not None:
        config = read_autoencoder_config(folder)
        check_downloads(folder, autoencoder_files(folder))
        scale = config.get("scaling_factor", SCALE)
        found = config.get("latent_channels", 4)
        if found != channels:
            raise UserError(
                f"latents of the autoencoder {folder} have {found} channels, those of the model "
                f"{channels}; give another autoencoder with --vae"
            )
    return {"autoencoder": name, "scale": scale if options.scale is None else options.scale}


def _check_counts(metadata: Metadata, found: Shapes, path: Path) -> None:
    """Refuse a damaged file's huge number of blocks or experts before a network is built."""
    blocks, experts = metadata.model.depth, metadata.moe.experts
    if blocks > len(found) or (metadata.moe.type != "dense" and experts > len(found)):
        raise UserError(f"{path}: {len(found)} tensors are too few for {blocks} blocks")


def _check_positions(path: Path, tensors: dict[str, Tensor], metadata: Metadata) -> None:
    found = tensors.get("pos_embed")
    if found is None:
        return
    rows, columns = metadata.model.grid
    expected = grid_positions(metadata.model.width, (rows, columns))[None]
    if found.shape != expected.shape or not torch.allclose(found.float(), expected, atol=1e-5):
        raise UserError(
            f"{path}: pos_embed is not the fixed sine-cosine table of a {rows}x{columns} grid; "
            "trained positions cannot be converted"
        )


def write_foreign(source: Source, target: Path, form: Format) -> tuple[str, ...]:
    """Write the source in another project's format: a .pt file {"ema": state}, or a folder.

    Returns notes for the user. Memory: the whole network, twice for diffusers. Raises UserError for
    a network that the format cannot represent.
    """
    source = source.checked()
    model, moe = source.metadata.model, source.metadata.moe
    if model.text is not None:
        raise UserError(
            f"{source.where} is text-conditioned, {form} supports only classes; choose --to diffmoe"
        )
    if model.wide_head is not None:
        raise UserError(
            f"{source.where} has a wide head, {form} supports none; choose --to diffmoe"
        )
    if form in ("dit", "sit") and moe.type != "dense":
        raise UserError(f"moe.type={moe.type}: {form} is dense; choose --to release")
    if not isinstance(model.input_size, int):
        raise UserError(f"{source.where} draws rectangles, {form} has squares; choose --to diffmoe")
    objective = source.metadata.diffusion.objective
    wanted = _OBJECTIVES.get(form, objective)
    if wanted != objective:
        raise UserError(f"{source.where} was trained with {objective}, but {form} needs {wanted}")
    if form == "diffusers":
        return _write_diffusers(source, target)
    null_row = source.metadata.label_dropout != 0
    layout = release_layout(model, moe, null_row)
    size = sum(torch.Size(shape).numel() for shape in source.shapes.values()) * 4
    with new_file(target, size) as temporary:
        state = translated(layout, source.read)
        state["pos_embed"] = grid_positions(model.width, model.grid)[None]
        for name in [n for n in state if n.endswith(".mlp.expert_threshold")]:
            prefix = name.rpartition(".")[0]
            state[f"{prefix}.ema_decay"] = torch.tensor([moe.threshold_ema])
        torch.save({"ema": state}, temporary)
    if null_row:
        return ()
    return (
        "the model was trained without label dropout, so there is no row for the null label: "
        "create the network there with class_dropout_prob=0",
    )


def _write_diffusers(source: Source, target: Path) -> tuple[str, ...]:
    """A pipeline's folder: transformer, scheduler, names of classes, a copy of a local autoencoder.

    Of a model of pixels, which a pipeline cannot draw, the transformer alone.
    """
    from safetensors.torch import save_file

    metadata = source.metadata
    model, is_pipeline = metadata.model, metadata.latents.autoencoder != "identity"
    rows = (hugging_face.NULL_LABEL if is_pipeline else model.num_classes) + 1
    if is_pipeline:
        hugging_face.check_pipeline(metadata)
    layout = hugging_face.diffusers_layout(model, metadata.moe, rows)
    vae = local_folder(metadata.latents.autoencoder) if is_pipeline else None
    with new_folder(target) as temporary:
        transformer = temporary / "transformer" if is_pipeline else temporary
        transformer.mkdir(exist_ok=True)
        state = translated(layout, source.read)
        save_file(state, transformer / WEIGHTS, metadata={"format": "pt"})
        (transformer / "config.json").write_text(hugging_face.diffusers_config(model, rows))
        digests = {
            name: {
                "bytes": (transformer / name).stat().st_size,
                "sha256": sha256_of(transformer / name),
            }
            for name in ("config.json", WEIGHTS)
        }
        (transformer / CHECKSUMS).write_text(json.dumps({"files": digests}, indent=1))
        if vae is not None:
            copy_autoencoder(vae, temporary)
            config = read_autoencoder_config(vae) | {"scaling_factor": metadata.latents.scale}
            if config.get("_class_name", hugging_face.VAE) != hugging_face.VAE:
                raise UserError(
                    f"{vae} is an {config['_class_name']}: {hugging_face.PIPELINE} supports only "
                    f"an {hugging_face.VAE}"
                )
            (temporary / "vae/config.json").write_text(json.dumps(config, indent=2))
        if is_pipeline:
            for name, content in hugging_face.pipeline_files(metadata, vae is not None).items():
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_text(json.dumps(content, indent=2))
        found = measure_difference(source, transformer, rows)
        (temporary / CARD).write_text(readme(found, metadata, vae is not None))
    notes = [describe(found)]
    if metadata.label_dropout == 0:
        notes.append(
            "the model was trained without label dropout: call the pipeline with guidance_scale=1"
        )
    return tuple(notes)
