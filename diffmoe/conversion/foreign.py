"""Files of other projects as sources, and sources as their files."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffmoe.conversion import hugging_face
from diffmoe.conversion.about import About, parse_about
from diffmoe.conversion.layouts import Layout, account_theirs, reader, translated
from diffmoe.conversion.release import is_derived, release_layout, sections_from_shapes
from diffmoe.conversion.sources import Source
from diffmoe.conversion.state_dicts import StateDict, load_state
from diffmoe.conversion.stored_tensors import StoredTensors
from diffmoe.conversion.tensors import Shapes, expected_shapes
from diffmoe.conversion.writing import new_file, new_folder
from diffmoe.errors import UserError
from diffmoe.files import sha256_of
from diffmoe.models.blocks import grid_positions

Format = Literal["release", "dit", "sit", "diffusers"]
FORMATS: tuple[Format, ...] = ("release", "dit", "sit", "diffusers")
_OBJECTIVES = {"dit": "ddpm", "diffusers": "ddpm", "sit": "flow"}
# Latents of the published models: Stable Diffusion's f8 autoencoder.
_AUTOENCODER, _SCALE = "stabilityai/sd-vae-ft-ema", 0.18215


@dataclass(frozen=True)
class Options:
    """What foreign files do not say. None: derived, or an error that names the flag.

    objective: flow or ddpm. heads: of attention. capacity, top_k: of training. autoencoder, scale:
    of 4-channel latents; others are taken for pixels.
    """

    objective: str | None = None
    heads: int | None = None
    input_size: int | None = None
    capacity: float = 1.0
    top_k: int = 1
    autoencoder: str = _AUTOENCODER
    scale: float = _SCALE


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
    sections = hugging_face.sections_of(folder)
    about = _about(folder / "config.json", sections, "diffusers", options, "ema")
    about = about.replace(provenance={"kind": "diffusers folder", "name": path.resolve().name})
    _plausible(about, stored.shapes, path)
    layout = hugging_face.diffusers_layout(about.model, about.moe)
    shapes = expected_shapes(about.model, about.moe)
    account_theirs(stored.shapes, layout, shapes, str(folder))
    notes = (f"{path} is a {hugging_face.CLASS} of diffusers", hugging_face.DIFFERENCE)
    return Source(str(path), about, shapes, reader(layout, stored.read, str(folder)), notes=notes)


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
            shapes, options.heads, options.input_size, options.capacity, options.top_k
        )
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    decay = next((t for name, t in tensors.items() if name.endswith(".mlp.ema_decay")), None)
    if decay is not None and decay.numel() == 1:
        sections[1]["threshold_ema"] = round(float(decay), 6)
    about = _about(path, sections, form, options, state.weights, objective)
    about = about.replace(
        provenance={
            "kind": f"{form or 'DiT or SiT'} file",
            "name": path.name,
            "sha256": sha256_of(path),
        }
    )
    _plausible(about, shapes, path)
    layout = release_layout(about.model, about.moe)
    ours = expected_shapes(about.model, about.moe)
    derived = {name for name in shapes if is_derived(name)}
    account_theirs({n: s for n, s in shapes.items() if n not in derived}, layout, ours, str(path))
    _check_positions(path, tensors, about)
    entry = f"its entry {state.entry!r}" if state.entry else "a plain state dict"
    notes = [f"{path} has the names of {'the release' if mixture else 'DiT and SiT'}; {entry}"]
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
) -> About:
    model, moe = sections
    size, channels = model["input_size"], model["in_channels"]
    latents: dict[str, Any] = {"shape": (channels, size, size)}
    if channels == 4:
        latents |= {"autoencoder": options.autoencoder, "scale": options.scale}
    values = {
        "weights": weights,
        "model": model,
        "moe": moe,
        "diffusion": {"objective": options.objective or objective or _OBJECTIVES[form]},
        "latents": latents,
        "provenance": {"kind": "foreign", "name": where.name},
    }
    return parse_about(values, where)


def _plausible(about: About, found: Shapes, path: Path) -> None:
    """Before blocks or experts are made in the number that a damaged file names."""
    blocks, experts = about.model.depth, about.moe.experts
    if blocks > len(found) or (about.moe.type != "dense" and experts > len(found)):
        raise UserError(f"{path}: {len(found)} tensors are not of {blocks} blocks")


def _check_positions(path: Path, tensors: dict[str, Tensor], about: About) -> None:
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


def write_foreign(source: Source, target: Path, form: Format) -> None:
    """Write the source in another project's names: a .pt file {"ema": state}, or a folder.

    The whole network is in memory once. Raises UserError where that project has no such network.
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
        _write_diffusers(source, target)
        return
    layout = release_layout(model, moe)
    size = sum(torch.Size(shape).numel() for shape in source.shapes.values()) * 4
    with new_file(target, size) as torn:
        state = translated(layout, source.read)
        grid = model.input_size // model.patch_size
        state["pos_embed"] = grid_positions(model.width, grid)[None]
        for name in [n for n in state if n.endswith(".mlp.expert_threshold")]:
            prefix = name.rpartition(".")[0]
            state[f"{prefix}.ema_decay"] = torch.tensor([moe.threshold_ema])
        torch.save({"ema": state}, torn)


def _write_diffusers(source: Source, target: Path) -> None:
    from safetensors.torch import save_file

    model, moe = source.about.model, source.about.moe
    layout: Layout = hugging_face.diffusers_layout(model, moe)
    with new_folder(target) as torn:
        state = translated(layout, source.read)
        save_file(state, torn / hugging_face.WEIGHTS, metadata={"format": "pt"})
        (torn / "config.json").write_text(hugging_face.diffusers_config(model))
