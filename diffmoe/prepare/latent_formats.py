"""Formats of latents that other projects cache: where the files are and what the numbers mean.

Each reader returns the items, a function that loads one, and the Manifest fields that the format
implies; the user must supply the rest. Facts from the projects' public code, November 2026.
"""

import json
import math
import os
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from diffmoe.data.tar_index import MEMBER_LIMIT, Member
from diffmoe.errors import UserError
from diffmoe.files import (
    check_safetensors,
    check_unpacked,
    contained,
    read_bytes,
    read_text,
    refuse_special,
)
from diffmoe.npz_files import decode_npy, read_npz
from diffmoe.prepare.image_folders import index_tar, label_of, member_bytes
from diffmoe.prepare.plain_tars import COMPRESSED, PlainTars

_LABELS_LIMIT = 128 << 20  # bytes of dataset.json; ImageNet's has 60 MB
_GROWTH = 20  # largest ratio of unpacked to packed size of a zip file


class LatentItem(NamedTuple):
    """One cached sample: a file, or a part of one."""

    name: str
    path: str
    label: int | None = None  # None: in a file of its own
    part: Any = None  # an index, or a member of a tar or zip

    @property
    def known_label(self) -> int:
        """The label, for formats that keep it with the item."""
        assert self.label is not None
        return self.label


class Arrays(NamedTuple):
    """A sample with the numbers of its files."""

    label: int
    array: np.ndarray
    flip: np.ndarray | None = None


class CachedLatents(NamedTuple):
    """Another project's cached data set."""

    items: list[LatentItem]
    load: Callable[[LatentItem], Arrays]
    fields: dict[str, Any]


def fast_dit(root: Path) -> CachedLatents:
    """`*_features/N.npy` (1,C,H,W), drawn and scaled by 0.18215; `*_labels/N.npy` (1,).

    Each image was randomly mirrored before it was encoded, so there are no flips.
    """
    features, labels = (_only(root, f"*_{kind}") for kind in ("features", "labels"))
    files = sorted(features.glob("*.npy"), key=lambda file: (len(file.stem), file.stem))

    def load(item: LatentItem) -> Arrays:
        label = _load_npy(labels / Path(item.path).name)
        if label.size != 1:
            raise ValueError(f"its label file contains {label.size} numbers")
        array = _load_npy(item.path)
        return Arrays(int(label.reshape(())), array.reshape(array.shape[-3:]))

    items = [LatentItem(file.name, str(file)) for file in files]
    fields = {"content": "sample", "scaled": True, "scale": 0.18215, "flips": False}
    return CachedLatents(items, load, fields)


def mar(root: Path) -> CachedLatents:
    """`CLASS/NAME.npz` with `moments` and `moments_flip`: mean and log-variance, unscaled.

    MAR and the DiffMoE release. Classes are numbered by sorted folder name, as in these projects.
    """
    classes, items = _of_class_folders(root, "*.npz")

    def load(item: LatentItem) -> Arrays:
        try:
            arrays = read_npz(Path(item.path), "moments", "moments_flip")
        except UserError as error:
            raise ValueError(str(error)) from None
        return Arrays(item.known_label, arrays["moments"], arrays["moments_flip"])

    fields = {"content": "mean_logvar", "scaled": False, "flips": True}
    return CachedLatents(items, load, {**fields, "classes": len(classes), "class_names": classes})


def dc_ae(root: Path) -> CachedLatents:
    """`CLASS/NAME.npy` (C,H,W), scaled; classes are numbered by sorted folder name.

    DC-AE's latents are computed, not drawn, and there are none of mirrored images.
    """
    classes, items = _of_class_folders(root, "*.npy")
    fields = {"content": "sample", "scaled": True, "flips": False}
    return CachedLatents(
        items,
        lambda item: Arrays(item.known_label, _load_npy(item.path)),
        {**fields, "classes": len(classes), "class_names": classes},
    )


def mean_std(root: Path) -> CachedLatents:
    """`NNNNN/img-mean-std-NNNNNNNN.npy`: mean and STANDARD DEVIATION; labels in `dataset.json`.

    REPA and EDM2: the same files, but of other pixel ranges and scales. root: a folder or a zip.
    """
    packed = root.suffix == ".zip"
    index = root / "dataset.json"
    try:
        text = _zip_member(root, "dataset.json") if packed else read_text(index, _LABELS_LIMIT)
        labels = {name: int(label) for name, label in json.loads(text)["labels"]}
        for folder in {os.path.dirname(name) for name in labels if not packed}:
            contained(root, folder)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{index} gives no labels ({type(error).__name__}: {error}); it must contain "
            '{"labels": [["00000/img-mean-std-00000000.npy", CLASS], ...]}'
        ) from None
    items = [
        LatentItem(f"{root.name}/{name}", str(root), label, name)
        if packed
        else LatentItem(name, str(root / name), label)
        for name, label in sorted(labels.items())
        if "img-mean-std-" in name
    ]

    def load(item: LatentItem) -> Arrays:
        array = decode_npy(_zip_member(root, item.part)) if packed else _load_npy(item.path)
        return Arrays(item.known_label, array)

    return CachedLatents(items, load, {"content": "mean_std", "scaled": False, "flips": False})


def repa(root: Path) -> CachedLatents:
    """As `mean_std`, of pixels -1..1; the project trains on samples times 0.18215."""
    found = mean_std(root)
    return found._replace(fields={**found.fields, "scale": 0.18215})


def edm2(root: Path) -> CachedLatents:
    """As `mean_std`, of pixels 0..1; whitened per channel to a standard deviation of 0.5."""
    found = mean_std(root)
    means, deviations = [5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]
    scale = [0.5 / deviation for deviation in deviations]
    fields = {"scale": scale, "shift": means, "pixel_range": (0.0, 1.0)}
    return found._replace(fields={**found.fields, **fields})


def lightning_dit(root: Path, stats: Path | None, multiplier: float) -> CachedLatents:
    """`*.safetensors` with `latents`, `latents_flip`, `labels`: drawn, unscaled.

    stats: latents_stats.pt with `mean` and `std` per channel; None: the folder's own. The model
        sees (z - mean) / std * multiplier.
    """
    stats = stats or root / "latents_stats.pt"
    try:
        refuse_special(stats)
        numbers = torch.load(stats, map_location="cpu", weights_only=True)
        mean, deviation = (numbers[key].flatten().tolist() for key in ("mean", "std"))
        if not all(map(math.isfinite, mean + deviation)) or 0 in deviation:
            raise ValueError(f"mean {mean}, std {deviation}")
    except Exception as error:  # torch.load raises many kinds
        raise UserError(
            f"{stats} gives no statistics ({type(error).__name__}: {error}); give --stats "
            "latents_stats.pt, which must contain mean and std"
        ) from None
    items = []
    for file in sorted(root.glob("*.safetensors")):
        try:
            stored = _open_safetensors(str(file))
            if (
                stored.get_slice("labels").get_shape()
                != stored.get_slice("latents").get_shape()[:1]
            ):
                raise ValueError("the numbers of labels and latents differ")
            labels = stored.get_tensor("labels").tolist()
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(
                f"{file} cannot be read ({error}); copy it again or remove it"
            ) from None
        items += [LatentItem(f"{file.name}#{i}", str(file), n, i) for i, n in enumerate(labels)]

    def load(item: LatentItem) -> Arrays:
        file = _open_safetensors(item.path)
        try:
            arrays = [file.get_slice(key)[item.part] for key in ("latents", "latents_flip")]
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        return Arrays(item.known_label, *(array.float().numpy() for array in arrays))

    fields = {
        "content": "sample",
        "scaled": False,
        "scale": [multiplier / number for number in deviation],
        "shift": mean,
        "flips": True,
    }
    return CachedLatents(items, load, fields)


def webdataset(root: Path, plain: PlainTars) -> CachedLatents:
    """`*.tar` of KEY.npy and KEY.cls. The user must say what the numbers mean.

    plain: unpacks compressed tars.
    """
    items = []
    tars = sorted(file for file in root.iterdir() if file.name.endswith((".tar", *COMPRESSED)))
    for tar, path in zip(tars, plain.unpacked(tars), strict=True):
        for entry, text in zip(*index_tar(path, tar), strict=True):
            arrays = [member for kind, member in entry.members.items() if kind.endswith("npy")]
            if len(arrays) != 1:
                raise UserError(
                    f"{tar}, sample {entry.key} has {len(arrays)} npy members, among "
                    f"{', '.join(entry.members)}; it must have one, and a cls"
                )
            label = label_of(f"{tar}, {entry.key}", text)
            items.append(LatentItem(f"{tar.name}/{entry.key}", str(path), label, arrays[0]))

    def load(item: LatentItem) -> Arrays:
        member: Member = item.part
        return Arrays(item.known_label, decode_npy(member_bytes(item.path, member)))

    return CachedLatents(items, load, {"flips": False})


def _of_class_folders(root: Path, pattern: str) -> tuple[list[str], list[LatentItem]]:
    """The class names, sorted, and the files in their folders."""
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    items = [
        LatentItem(f"{name}/{file.name}", str(file), label)
        for label, name in enumerate(classes)
        for file in sorted((root / name).glob(pattern))
    ]
    return classes, items


def _zip_member(path: Path, name: str) -> bytes:
    """Read a member of a zip file. Raises OSError or ValueError."""
    try:
        archive = _open_zip(str(path))
        if archive.getinfo(name).file_size > MEMBER_LIMIT:
            raise ValueError(f"{name} has more than {MEMBER_LIMIT:,} bytes")
        return archive.read(name)
    # RuntimeError: encryption or an unknown compression method.
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
        raise ValueError(str(error)) from None


@cache
def _open_zip(path: str) -> zipfile.ZipFile:
    refuse_special(path)
    archive = zipfile.ZipFile(path)
    check_unpacked(archive, os.path.getsize(path), _GROWTH)
    return archive


@cache
def _open_safetensors(path: str):
    check_safetensors(Path(path))
    return safe_open(path, framework="pt")


def _load_npy(path: str | Path) -> np.ndarray:
    return decode_npy(read_bytes(path, MEMBER_LIMIT))


def _only(root: Path, pattern: str) -> Path:
    """The only subfolder that matches a pattern."""
    found = sorted(path for path in root.glob(pattern) if path.is_dir())
    if len(found) != 1:
        raise UserError(f"{root} has {len(found)} folders {pattern}; it must have one")
    return found[0]
