"""Foreign latents into shards, with what their numbers mean said in the manifest."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from diffmoe.data.autoencoders import canonical_name
from diffmoe.data.manifest import Manifest, describe
from diffmoe.data.numbers import restored, stored
from diffmoe.errors import UserError
from diffmoe.files import check_tree
from diffmoe.prepare import foreign_latents
from diffmoe.prepare.foreign_latents import Foreign, LatentItem
from diffmoe.prepare.sharding import Made, Skipped, convert_items
from diffmoe.work import Ranks

# Each format's reader, and what its files leave open.
FORMATS = {
    "fast-dit": (foreign_latents.fast_dit, ("vae", "classes")),
    "mar": (foreign_latents.mar, ("vae", "scale")),
    "repa": (foreign_latents.repa, ("vae", "classes")),
    "edm2": (foreign_latents.edm2, ("vae", "classes")),
    "lightningdit": (foreign_latents.lightning_dit, ("vae", "classes", "multiplier")),
    "webdataset": (foreign_latents.webdataset, ("vae", "classes", "content", "scaled", "scale")),
}
_READ_ERRORS = (OSError, ValueError, KeyError, EOFError)


def import_latents(
    kind: str,
    source: str | Path,
    directory: str | Path,
    *,
    answers: dict[str, Any],
    stats: str | None = None,
    dtype: str = "float16",
    shards: int | None = None,
    max_bad: int = 0,
    overwrite: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 (a tuple)
) -> Manifest | None:
    """Pack the latents of another project. Returns the manifest, or None while ranks still work.

    answers: what the user says, by flag: vae, classes, multiplier, or fields of Manifest (content,
        scaled, scale, shift, pixel_range). They win over what the format says.
    stats: for lightningdit, its statistics file.
    """
    root = Path(source)
    if not root.is_dir():
        raise UserError(f"--latents {root} is no folder")
    check_tree(root, "")
    read, needed = FORMATS[kind]
    missing = [f"--{flag}" for flag in needed if answers.get(flag) is None]
    if missing:
        raise UserError(
            f"--format {kind} leaves open what its files do not say; give {', '.join(missing)} "
            "(--help explains them)"
        )
    answers = {name: value for name, value in answers.items() if value is not None}
    vae, multiplier = answers.pop("vae"), answers.pop("multiplier", None)
    if kind == "lightningdit":
        data = read(root, Path(stats) if stats else None, multiplier)
    else:
        data = read(root)
    if not data.items:
        raise UserError(f"--latents {root} holds no files of --format {kind}; --help shows them")
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
            _check_label(root, item, item.label, fields["classes"])
    keys = {item.name: f"{number:08d}" for number, item in enumerate(data.items)}
    try:
        array_shape = Manifest(shards=[], **fields).array_shape
    except ValidationError as error:
        problems = "; ".join(describe(problem) for problem in error.errors())
        raise UserError(f"{problems}: mend the flags") from None

    def convert(items: Sequence[LatentItem]) -> Iterator[Made | Skipped]:
        for item in items:
            try:
                label, *arrays = data.load(item)
                _check_label(root, item, label, fields["classes"])
                arrays = [
                    _stored(_fit(array, array_shape), dtype)
                    for array in arrays
                    if array is not None
                ]
            except _READ_ERRORS as error:
                yield Skipped(item.name, f"{type(error).__name__}: {error}")
            else:
                yield Made(keys[item.name], label, *arrays)

    return convert_items(
        directory,
        data.items,
        convert,
        fields=fields,
        shards=shards,
        ranks=ranks,
        max_bad=max_bad,
        overwrite=overwrite,
    )


def _check_label(root: Path, item: LatentItem, label: int, classes: int) -> None:
    if not 0 <= label < classes:
        raise UserError(
            f"--latents {root}: {item.name}: label {label} is outside the classes "
            f"0..{classes - 1}; mend it, or give another --classes"
        )


def _shape(data: Foreign, content: str) -> tuple[int, int, int]:
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
                f"{item.name} has shape {shape}, but content={content} needs {wanted}; is it of "
                "another --format?"
            )
        channels = shape[0] if content == "sample" else shape[0] // 2
        return (channels, *shape[1:])
    raise UserError(f"none of the first files can be read, such as {reason}; another --format?")


def _stored(array: np.ndarray, dtype: str) -> np.ndarray:
    packed = stored(array, dtype)
    if not np.isfinite(restored(packed, dtype)).all():
        raise ValueError(f"{np.abs(array).max():g} is more than {dtype} can hold")
    return packed


def _fit(array: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    array = np.asarray(array, dtype=np.float32)
    if array.shape != shape:
        raise ValueError(f"shape {array.shape}, while the first file gives {shape}")
    if not np.isfinite(array).all():
        raise ValueError("NaN or infinity")
    return array
