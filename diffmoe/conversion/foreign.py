"""Files of other projects as sources, and sources as their files."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffmoe.conversion import hugging_face
from diffmoe.conversion.difference import in_words, measured, readme
from diffmoe.conversion.downloads import check_downloads
from diffmoe.conversion.layouts import Layout, check_their_state_dict, reader, translated
from diffmoe.conversion.release import (
    is_derived,
    label_rows,
    release_layout,
    sections_from_shapes,
)
from diffmoe.conversion.state_dicts import StateDict, load_state
from diffmoe.data.autoencoders import canonical_name
from diffmoe.errors import UserError
from diffmoe.export.autoencoder_folder import autoencoder_files, local_folder, own_config
from diffmoe.export.exported import CARD, CHECKSUMS
from diffmoe.export.metadata import Metadata, parse_metadata
from diffmoe.export.sources import Source
from diffmoe.export.stored_tensors import StoredTensors, hold_against
from diffmoe.export.tensors import Shapes, expected_shapes
from diffmoe.export.writing import new_file, new_folder
from diffmoe.files import sha256_of
from diffmoe.models.blocks import grid_positions

Format = Literal["release", "dit", "sit", "diffusers"]
FORMATS: tuple[Format, ...] = ("release", "dit", "sit", "diffusers")
_OBJECTIVES = {"dit": "ddpm", "diffusers": "ddpm", "sit": "flow"}
# Latents of the published models: Stable Diffusion's f8 autoencoder.
AUTOENCODER, SCALE = "stabilityai/sd-vae-ft-ema", 0.18215


@dataclass(frozen=True)
class Options:
    """What foreign files do not say. None: derived, or an error that names the flag.

    objective: flow or ddpm. heads: of attention. num_classes: without the null one. capacity,
    top_k: of training. autoencoder, scale: of the latents; of None a pipeline's own vae/, else
    Stable Diffusion's if there are 4 channels, others are taken for pixels.
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

    weights: ema or live, the entry of a .pt file. form: None detects it. Every name and shape in
    the file is accounted for; the notes say what was detected and what to beware of.
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
            f"{path} is no folder of a {hugging_face.CLASS}"
            + (f", and --format {form} is a file" if form not in (None, "diffusers") else "")
        )
    stored = StoredTensors(folder, hugging_face.WEIGHTS)
    if (folder / CHECKSUMS).exists():
        hold_against(folder / CHECKSUMS, stored.files, sha256_of)
    check_downloads(folder, stored.files)
    sections = hugging_face.sections_of(folder)
    notes = [f"{path} is a {hugging_face.CLASS} of diffusers", hugging_face.DIFFERENCE]
    names = None
    if (path / hugging_face.INDEX).exists():
        names = hugging_face.class_names(path, sections[0]["num_classes"])
        if options.objective is None:
            scheduler = hugging_face.check_scheduler(path)
            notes.append(f"its scheduler is {scheduler}; here --sampler ddpm or ddim")
        if options.autoencoder is None and (path / "vae").is_dir():
            options = replace(options, autoencoder=str(path / "vae"))
    about = _about(folder / "config.json", sections, "diffusers", options, "ema")
    about = about.replace(
        provenance={"kind": "diffusers folder", "name": path.resolve().name}, class_names=names
    )
    notes.append(f"its autoencoder is {about.latents.autoencoder}, scale {about.latents.scale}")
    _plausible(about, stored.shapes, path)
    layout = hugging_face.diffusers_layout(about.model, about.moe)
    shapes = expected_shapes(about.model, about.moe)
    check_their_state_dict(stored.shapes, layout, shapes, str(folder))
    read = reader(layout, stored.read, str(folder))
    return Source(str(path), about, shapes, read, notes=tuple(notes))


def _release(path: Path, state: StateDict, form: Format | None, options: Options) -> Source:
    tensors = state.tensors
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    mixture = any(".mlp.experts." in name for name in shapes)
    if form == "diffusers" or (form in ("dit", "sit") and mixture):
        raise UserError(f"{path} is not of --format {form}" + (": it has experts" * mixture))
    if form is None and mixture:
        form = "release"
    objective = options.objective or _OBJECTIVES.get(form or "")
    if objective is None:
        names = "the release's" if mixture else "those of DiT (ddpm), SiT (flow) and the release"
        raise UserError(
            f"{path}: the names are {names}, and do not show the objective; give --format dit, "
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
    about = _about(path, sections, form, options, state.weights, objective)
    about = about.replace(
        provenance={
            "kind": f"{form or 'DiT or SiT'} file",
            "name": path.name,
            "sha256": sha256_of(path),
        },
        label_dropout=0.0 if classes == rows else None,
    )
    _plausible(about, shapes, path)
    layout = release_layout(about.model, about.moe, null_row=classes < rows)
    ours = expected_shapes(about.model, about.moe)
    derived = {name for name in shapes if is_derived(name)}
    check_their_state_dict(
        {n: s for n, s in shapes.items() if n not in derived}, layout, ours, str(path)
    )
    _check_positions(path, tensors, about)
    entry = f"its entry {state.entry!r}" if state.entry else "a plain state dict"
    names = "the release" if mixture else "DiT and SiT"
    notes = [f"{path} has the names of {names}; {entry}; {classes} classes", *state.notes]
    if classes == rows:
        notes.append(
            "the table of labels has no row for the null one: the model was trained without label "
            "dropout, and is sampled without guidance"
        )
    if options.heads is None:
        notes.append(
            f"{about.model.heads} attention heads, as published models of width "
            f"{about.model.width} have; the tensors look alike with others (the release's example "
            "of S has 16): --heads N"
        )
    if about.moe.type == "diffmoe" and state.weights == "ema":
        notes.append(
            "warning: the release averages thresholds along with the weights, so those of its "
            "`ema` entry may lag behind (0.056 for 0.600 after 1,000 steps) and let experts take "
            "too many tokens; they are kept as they are. Calibrate: python tools/calibrate.py "
            "FOLDER --capacity 1"
        )
    return Source(
        str(path), about, ours, reader(layout, tensors.__getitem__, str(path)), notes=tuple(notes)
    )


def _about(
    where: Path,
    sections: tuple[dict[str, Any], dict[str, Any]],
    form: Format | None,
    options: Options,
    weights: str,
    objective: str | None = None,
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
        "diffusion": {"objective": options.objective or objective or _OBJECTIVES[form]},
        "latents": latents,
        "provenance": {"kind": "foreign", "name": where.name},
    }
    return parse_metadata(values, where)


def _autoencoder(options: Options, channels: int) -> dict[str, Any]:
    """The fields of the latents. Raises UserError for a folder of other latents."""
    name = canonical_name(options.autoencoder or AUTOENCODER)
    folder, scale = local_folder(name), SCALE
    if folder is not None:
        own = own_config(folder)
        check_downloads(folder, autoencoder_files(folder))
        scale = own.get("scaling_factor", SCALE)
        if own.get("latent_channels", 4) != channels:
            raise UserError(
                f"the autoencoder {folder} makes latents of {own.get('latent_channels', 4)} "
                f"channels, the model takes {channels}; give another one with --vae"
            )
    return {"autoencoder": name, "scale": scale if options.scale is None else options.scale}


def _plausible(about: Metadata, found: Shapes, path: Path) -> None:
    """Before blocks or experts are made in the number that a damaged file names."""
    blocks, experts = about.model.depth, about.moe.experts
    if blocks > len(found) or (about.moe.type != "dense" and experts > len(found)):
        raise UserError(f"{path}: {len(found)} tensors are not of {blocks} blocks")


def _check_positions(path: Path, tensors: dict[str, Tensor], about: Metadata) -> None:
    found = tensors.get("pos_embed")
    if found is None:
        return
    grid = about.model.input_size // about.model.patch_size
    expected = grid_positions(about.model.width, grid)[None]
    if found.shape != expected.shape or not torch.allclose(found.float(), expected, atol=1e-5):
        raise UserError(
            f"{path}: pos_embed is not the fixed sine-cosine table of a {grid}x{grid} grid; "
            "trained positions have no place in our network"
        )


def write_foreign(source: Source, target: Path, form: Format) -> tuple[str, ...]:
    """Write the source in another project's names: a .pt file {"ema": state}, or a folder.

    -> what its user should know. The whole network is in memory once, of a folder for diffusers
    twice. Raises UserError where that project has no such network.
    """
    source = source.checked()
    model, moe = source.about.model, source.about.moe
    if model.text is not None:
        raise UserError(
            f"{source.where} draws captions, {form} knows classes alone; choose our own"
        )
    if form in ("dit", "sit") and moe.type != "dense":
        raise UserError(f"moe.type={moe.type}: {form} is dense; choose --to release")
    objective = source.about.diffusion.objective
    wanted = _OBJECTIVES.get(form, objective)
    if wanted != objective:
        raise UserError(f"a {objective} model is no {form}, which is trained with {wanted}")
    if form == "diffusers":
        return _write_diffusers(source, target)
    null_row = source.about.label_dropout != 0
    layout = release_layout(model, moe, null_row)
    size = sum(torch.Size(shape).numel() for shape in source.shapes.values()) * 4
    with new_file(target, size) as torn:
        state = translated(layout, source.read)
        grid = model.input_size // model.patch_size
        state["pos_embed"] = grid_positions(model.width, grid)[None]
        for name in [n for n in state if n.endswith(".mlp.expert_threshold")]:
            prefix = name.rpartition(".")[0]
            state[f"{prefix}.ema_decay"] = torch.tensor([moe.threshold_ema])
        torch.save({"ema": state}, torn)
    if null_row:
        return ()
    return (
        "labels were never dropped in training, so the null label has no row: the network there is "
        "made with class_dropout_prob=0",
    )


def _write_diffusers(source: Source, target: Path) -> tuple[str, ...]:
    from safetensors.torch import save_file

    model, moe = source.about.model, source.about.moe
    layout: Layout = hugging_face.diffusers_layout(model, moe)
    with new_folder(target) as torn:
        state = translated(layout, source.read)
        save_file(state, torn / hugging_face.WEIGHTS, metadata={"format": "pt"})
        (torn / "config.json").write_text(hugging_face.diffusers_config(model))
        found = measured(source, torn)
        (torn / CARD).write_text(readme(found))
        digests = {
            name: {"bytes": (torn / name).stat().st_size, "sha256": sha256_of(torn / name)}
            for name in ("config.json", hugging_face.WEIGHTS)
        }
        (torn / CHECKSUMS).write_text(json.dumps({"files": digests}, indent=1))
    return (in_words(found),)
