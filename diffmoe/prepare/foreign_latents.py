"""Import latents that other projects have cached; the manifest says what their numbers mean."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from diffmoe.data.autoencoders import canonical_name
from diffmoe.data.latents import Sample, from_stored, to_stored
from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError, describe_problem
from diffmoe.files import check_tree, does_not_exist
from diffmoe.prepare import latent_formats
from diffmoe.prepare.image_folders import check_label
from diffmoe.prepare.latent_formats import CachedLatents, LatentItem
from diffmoe.prepare.plain_tars import PlainTars
from diffmoe.prepare.sharding import ShardOutput, Skipped, convert_items

# Each format's reader, and the flags for what its files do not say.
FORMATS: dict[str, tuple[Callable[..., CachedLatents], tuple[str, ...]]] = {
    "fast-dit": (latent_formats.fast_dit, ("vae", "classes")),
    "mar": (latent_formats.mar, ("vae", "scale")),
    "dcae": (latent_formats.dc_ae, ("vae", "scale")),
    "repa": (latent_formats.repa, ("vae", "classes")),
    "edm2": (latent_formats.edm2, ("vae", "classes")),
    "lightningdit": (latent_formats.lightning_dit, ("vae", "classes", "multiplier")),
    "webdataset": (latent_formats.webdataset, ("vae", "classes", "content", "scaled", "scale")),
}
_ZIPPED = ("repa", "edm2")  # which a zip file may hold, too
_READ_ERRORS = (OSError, ValueError, KeyError, EOFError)


def import_latents(
    kind: str,
    source: str | Path,
    output: ShardOutput,
    *,
    answers: dict[str, Any],
    stats: str | None = None,
    dtype: str = "float16",
) -> Manifest | None:
    """Pack another project's latents. Returns the manifest, or None while other ranks still work.

    kind: one of FORMATS.
    answers: values by flag: vae, classes, multiplier, or fields of Manifest (content, scaled,
        scale, shift, pixel_range). They override what the format implies; None counts as missing.
    stats: for lightningdit, its statistics file; None: the one beside the latents.

    Raises UserError.
    """
    root = Path(source)
    if not root.exists():
        raise UserError(f"--latents {does_not_exist(root)}")
    if root.is_dir():
        check_tree(root, "")
    elif not (kind in _ZIPPED and root.suffix == ".zip"):
        raise UserError(f"--latents {root} is not a folder")
    read, needed = FORMATS[kind]
    missing = [f"--{flag}" for flag in needed if answers.get(flag) is None]
    if missing:
        raise UserError(
            f"the files of --format {kind} do not say everything; give {', '.join(missing)} "
            "(--help explains them)"
        )
    answers = {name: value for name, value in answers.items() if value is not None}
    vae, multiplier = answers.pop("vae"), answers.pop("multiplier", None)
    plain = PlainTars(Path(output.directory) / ".unpacked", output.ranks)
    if kind == "lightningdit":
        data = read(root, Path(stats) if stats else None, multiplier)
    elif kind == "webdataset":
        data = read(root, plain)
    else:
        data = read(root)
    if not data.items:
        raise UserError(
            f"--latents {root} contains no files of --format {kind}; --help describes the formats"
        )
    fields = {
        **data.fields,
        **answers,
        "autoencoder": canonical_name(vae),
        "source": f"{kind} latents of {root.resolve()}",
        "dtype": dtype,
    }
    fields["shape"] = _shape(data, fields["content"])
    for item in data.items:
        if item.label is not None:
            check_label(f"--latents {root}: {item.name}", item.label, fields["classes"])
    keys = {item.name: f"{number:08d}" for number, item in enumerate(data.items)}
    try:
        array_shape = Manifest(shards=[], **fields).array_shape
    except ValidationError as error:
        problems = "; ".join(describe_problem(problem) for problem in error.errors())
        raise UserError(f"{problems}: fix the flags") from None

    def convert(items: Sequence[LatentItem]) -> Iterator[Sample | Skipped]:
        for item in items:
            try:
                label, array, flip = data.load(item)
                check_label(f"--latents {root}: {item.name}", label, fields["classes"])
                array = _stored(_checked(array, array_shape), dtype)
                if flip is not None:
                    flip = _stored(_checked(flip, array_shape), dtype)
            except _READ_ERRORS as error:
                yield Skipped(item.name, f"{type(error).__name__}: {error}")
            else:
                yield Sample(keys[item.name], label, array, flip)

    manifest = convert_items(data.items, convert, fields, output)
    if manifest is not None:
        plain.remove()
    return manifest


def _shape(data: CachedLatents, content: str) -> tuple[int, int, int]:
    """(C,H,W) of the latents, from the first sample that can be read."""
    reason = ""
    for item in data.items[:100]:
        try:
            shape = data.load(item).array.shape
        except _READ_ERRORS as error:
            reason = reason or f"{item.name}: {type(error).__name__}: {error}"
            continue
        if len(shape) != 3 or (content != "sample" and shape[0] % 2):
            wanted = "(C,H,W)" if content == "sample" else "(2C,H,W), mean and spread"
            raise UserError(
                f"{item.name} has shape {shape}, but content={content} needs {wanted}; is this "
                "another --format?"
            )
        channels = shape[0] if content == "sample" else shape[0] // 2
        return (channels, *shape[1:])
    raise UserError(
        f"none of the first files can be read, such as {reason}; is this another --format?"
    )


def _stored(array: np.ndarray, dtype: str) -> np.ndarray:
    stored = to_stored(array, dtype)
    if not np.isfinite(from_stored(stored, dtype)).all():
        raise ValueError(f"{np.abs(array).max():g} is too large for {dtype}")
    return stored


def _checked(array: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    array = np.asarray(array, dtype=np.float32)
    if array.shape != shape:
        raise ValueError(f"shape {array.shape}, but the first file has {shape}")
    if not np.isfinite(array).all():
        raise ValueError("NaN or infinity")
    return array
