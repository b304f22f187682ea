"""Writing shards: tar files and their manifest. The same input gives the same bytes."""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from diffmoe.data.captions import Captions, check_captions, feature_arrays, txt_member
from diffmoe.data.latents import check_features, from_stored, stored_types
from diffmoe.data.manifest import FILE_NAME, Manifest, Shard
from diffmoe.errors import UserError
from diffmoe.files import sha256_of, temporary_name

# webdataset splits a member's name at the first dot and skips names in double underscores.
_KEY = re.compile(r"(?!__)[^\s./][^\s.]*")


def shard_sizes(samples: int, shards: int) -> list[int]:
    """Split `samples` into `shards` counts that differ by at most one. Raises UserError."""
    if not 1 <= shards <= samples:
        raise UserError(
            f"cannot split {samples} samples into {shards} shards; choose 1..{samples} shards"
        )
    return [samples // shards + (index < samples % shards) for index in range(shards)]


class ShardFile:
    """One tar being written: `add` samples, then `close`. Only then does it get its name."""

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self._keys: set[str] = set()
        # A name of this process alone: the same command may have been started twice.
        self._temporary = temporary_name(path)
        self._file = open(self._temporary, "wb")  # noqa: SIM115 (closed in close and abandon)
        self._tar = webdataset.TarWriter(
            self._file, user="diffmoe", group="diffmoe", mode=0o644, mtime=0, encoder=False
        )

    def __len__(self) -> int:
        return len(self._keys)

    def add(
        self,
        key: str,
        label: int,
        array: np.ndarray,
        flip: np.ndarray | None = None,
        captions: Captions | None = None,
        features: Sequence[np.ndarray] = (),
    ) -> None:
        """Append one sample. Raises UserError if it does not fit the manifest.

        array: the latent (C,H,W) or the moments (2C,H,W), finite, of the manifest's dtype.
        flip: the same of the mirrored image; required if the manifest `stores_flips`, else None.
        captions: required if the manifest has a `text`, else None.
        features: of the manifest's `feature_members`, in their order.
        """
        arrays = _checked(self.manifest, key, label, array, flip)
        if captions is not None or self.manifest.text is not None:
            arrays |= _checked_captions(self.manifest, key, captions)
        arrays |= _checked_features(self.manifest, key, features)
        if key in self._keys:
            raise UserError(f"sample key {key!r} occurs twice in one shard; keys must be unique")
        self._keys.add(key)
        members = {name: _npy(value) for name, value in arrays.items()}
        if captions is not None:
            members["txt"] = txt_member(captions.lines)
        self._tar.write({"__key__": key, **members, "cls": str(int(label)).encode()})

    def close(self) -> Shard:
        """Finish the tar and give it its name. Returns its entry in the manifest."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        shard = Shard(
            name=self.path.name,
            samples=len(self),
            bytes=self._temporary.stat().st_size,
            sha256=sha256_of(self._temporary),
        )
        os.replace(self._temporary, self.path)
        return shard

    def abandon(self) -> None:
        """Remove the unfinished file."""
        self._tar.close()
        self._file.close()
        self._temporary.unlink()


class ShardWriter:
    """Write `{000000..}.tar` and, if the `with` block succeeds, manifest.json.

    samples_per_shard: one number for all shards (the last may get fewer), or the exact count of
        each (see `shard_sizes`).
    fields: those of Manifest except shards: content, scaled, shape, flips, classes, ...

    If the block fails there is no manifest, so an incomplete folder is not mistaken for data.
    """

    def __init__(
        self,
        directory: str | Path,
        samples_per_shard: int | Sequence[int],
        *,
        overwrite: bool = False,
        **fields: Any,
    ):
        self.directory = Path(directory)
        self.manifest = Manifest(shards=[], **fields)
        self._sizes = samples_per_shard
        sizes = [samples_per_shard] if isinstance(samples_per_shard, int) else samples_per_shard
        if min(sizes) < 1:
            raise ValueError(
                f"samples_per_shard={samples_per_shard}: every shard needs at least one sample"
            )
        self._shard: ShardFile | None = None
        clear(self.directory, overwrite)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is not None:
            if self._shard is not None:
                self._shard.abandon()
            return
        if self._shard is not None:
            self._finish(self._shard)
        if isinstance(self._sizes, Sequence) and len(self._sizes) != len(self.manifest.shards):
            raise ValueError(
                f"{self.manifest.samples} samples were added, {sum(self._sizes)} were planned"
            )
        if not self.manifest.shards:
            raise UserError(f"no samples were added to {self.directory}; nothing was packed")
        self.manifest.save(self.directory)

    def add(
        self,
        key: str,
        label: int,
        array: np.ndarray,
        flip: np.ndarray | None = None,
        captions: Captions | None = None,
        features: Sequence[np.ndarray] = (),
    ) -> None:
        """Append one sample: see `ShardFile.add`."""
        planned = self._planned()
        if self._shard is None:
            index = len(self.manifest.shards)
            self._shard = ShardFile(self.directory / shard_name(index), self.manifest)
        self._shard.add(key, label, array, flip, captions, features)
        if len(self._shard) == planned:
            self._finish(self._shard)

    def _planned(self) -> int:
        """How many samples the current shard takes."""
        if isinstance(self._sizes, int):
            return self._sizes
        index = len(self.manifest.shards)
        if index == len(self._sizes):
            raise ValueError(f"more than the {sum(self._sizes)} planned samples were added")
        return self._sizes[index]

    def _finish(self, shard: ShardFile) -> None:
        self.manifest.shards.append(shard.close())
        self._shard = None


def shard_name(index: int) -> str:
    """The file name of shard number `index`."""
    return f"{index:06d}.tar"


def clear(directory: Path, overwrite: bool) -> None:
    """Make `directory` and remove earlier shards and manifests there, complete or not.

    Raises UserError if there are any and `overwrite` is False.
    """
    old = sorted(directory.glob("[0-9][0-9][0-9][0-9][0-9][0-9].tar*"))
    old += sorted(directory.glob(FILE_NAME + "*"))
    if old and not overwrite:
        raise UserError(
            f"{directory} already holds {old[-1].name}; choose another folder or replace its "
            "contents (--overwrite)"
        )
    directory.mkdir(parents=True, exist_ok=True)
    for file in reversed(old):  # the manifest first
        file.unlink()


def _checked(
    manifest: Manifest, key: str, label: int, array: np.ndarray, flip: np.ndarray | None
) -> dict[str, np.ndarray]:
    """The npy members of a sample, checked against the manifest."""
    if not _KEY.fullmatch(key):
        raise UserError(
            f"sample key {key!r} contains a dot or a space, or begins with / or __, which "
            "webdataset does not read as a key; rename the sample"
        )
    if not 0 <= label < manifest.classes:
        raise UserError(
            f"sample {key}: label {label} is outside the classes 0..{manifest.classes - 1}; "
            "fix the label or the number of classes"
        )
    if (flip is not None) != manifest.stores_flips:
        raise UserError(
            f"sample {key}: flips={manifest.flips}, mirrored={manifest.mirrored}, but flip is "
            f"{type(flip).__name__}"
        )
    arrays = {f"{manifest.member}.npy": array}
    if flip is not None:
        arrays[f"{manifest.member}_flip.npy"] = flip
    types = stored_types(manifest.dtype)
    for name, value in arrays.items():
        if value.shape != manifest.array_shape:
            raise UserError(
                f"sample {key}: {name} has shape {value.shape}, but content={manifest.content} "
                f"with shape={manifest.shape} needs {manifest.array_shape}"
            )
        if value.dtype not in types:
            wanted = " or ".join(str(kind) for kind in types)
            raise UserError(
                f"sample {key}: {name} is {value.dtype}; use {wanted} (dtype={manifest.dtype})"
            )
        if not np.isfinite(from_stored(value, manifest.dtype)).all():
            raise UserError(f"sample {key}: {name} contains NaN or infinity; leave the sample out")
    return arrays


def _checked_captions(
    manifest: Manifest, key: str, captions: Captions | None
) -> dict[str, np.ndarray]:
    """The npy members of a sample's captions, checked against the manifest."""
    if captions is None or manifest.text is None:
        there = "has no captions" if captions is None else "has captions"
        raise UserError(f"sample {key} {there}, but the manifest says text={manifest.text}")
    try:
        check_captions(captions, manifest.text)
    except ValueError as error:
        raise UserError(f"sample {key}: {error}") from None
    return feature_arrays(captions)


def _checked_features(
    manifest: Manifest, key: str, features: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """The npy members of an image encoder's features, checked against the manifest."""
    names, content = manifest.feature_members, manifest.features
    if len(features) != len(names):
        raise UserError(
            f"sample {key} has {len(features)} arrays of features, but the manifest's features="
            f"{content} with flips={manifest.flips} need {len(names)}"
        )
    for name, array in zip(names, features, strict=True):
        assert content is not None
        try:
            check_features(array, content)
        except ValueError as error:
            raise UserError(f"sample {key}: {name}: {error}") from None
    return dict(zip(names, features, strict=True))


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
