"""Writing shards: samples in, tar files and their manifest out; same input, same bytes."""

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import webdataset

from diffmoe.data.manifest import FILE_NAME, Manifest, Shard, sha256_of
from diffmoe.errors import UserError

# webdataset splits a member's name at the first dot, and skips names in double underscores.
_KEY = re.compile(r"(?!__)[^\s./][^\s.]*")


def shard_sizes(samples: int, shards: int) -> list[int]:
    """Split `samples` into `shards` counts that differ by one at most."""
    if not 1 <= shards <= samples:
        raise UserError(
            f"cannot split {samples} samples into {shards} shards; choose 1..{samples} shards"
        )
    return [samples // shards + (index < samples % shards) for index in range(shards)]


class ShardWriter:
    """Write `{000000..}.tar` and, when the `with` block ends well, manifest.json.

    samples_per_shard: how many samples each shard takes: one number for all (the last may get
        fewer), or the exact count of each (see `shard_sizes`).
    fields: those of Manifest, without shards: content, scaled, shape, flips, classes, ...

    Every file gets its name when it is complete. A block that fails leaves no manifest, and so no
    data folder that could be taken for a whole one.
    """

    def __init__(
        self,
        directory: str | Path,
        samples_per_shard: int | Sequence[int],
        *,
        overwrite: bool = False,
        **fields,
    ):
        self.directory = Path(directory)
        self.manifest = Manifest(shards=[], **fields)
        if (
            min(
                samples_per_shard
                if isinstance(samples_per_shard, Sequence)
                else [samples_per_shard]
            )
            < 1
        ):
            raise ValueError(f"samples_per_shard={samples_per_shard}: every shard needs a sample")
        self._sizes = samples_per_shard
        self._tar: webdataset.TarWriter | None = None
        self._keys: set[str] = set()
        # Everything an earlier packing left behind, a finished one or not.
        old = sorted(self.directory.glob("[0-9][0-9][0-9][0-9][0-9][0-9].tar*"))
        old += [file for file in [self.directory / FILE_NAME] if file.exists()]
        if old and not overwrite:
            raise UserError(
                f"{self.directory} already holds {old[-1].name}; choose another folder, or "
                "overwrite it (--overwrite)"
            )
        self.directory.mkdir(parents=True, exist_ok=True)
        for file in reversed(old):  # the manifest first
            file.unlink()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None:
            self._abandon()
            return
        if self._tar is not None:
            self._finish_shard()
        if isinstance(self._sizes, Sequence) and len(self._sizes) != len(self.manifest.shards):
            raise ValueError(
                f"{self.manifest.samples} samples came, {sum(self._sizes)} were planned"
            )
        if not self.manifest.shards:
            raise UserError(f"no samples came for {self.directory}; nothing was packed")
        self.manifest.save(self.directory)

    def add(self, key: str, label: int, array: np.ndarray, flip: np.ndarray | None = None) -> None:
        """Append one sample.

        array: the latent (C,H,W) or the moments (2C,H,W), float16 or float32, finite.
        flip: the same of the mirrored image, exactly when the manifest says `flips`.
        """
        manifest = self.manifest
        if not _KEY.fullmatch(key):
            raise UserError(
                f"sample key {key!r} holds a dot or a space, or begins with / or __: webdataset "
                "cuts keys at the first dot; rename the sample"
            )
        if not 0 <= label < manifest.classes:
            raise UserError(
                f"sample {key}: label {label} is outside the classes 0..{manifest.classes - 1}; "
                "mend the label or the number of classes"
            )
        if (flip is not None) != manifest.flips:
            raise UserError(
                f"sample {key}: flips={manifest.flips}, but flip is {type(flip).__name__}"
            )
        arrays = {f"{manifest.member}.npy": array}
        if flip is not None:
            arrays[f"{manifest.member}_flip.npy"] = flip
        for name, value in arrays.items():
            if value.shape != manifest.array_shape:
                raise UserError(
                    f"sample {key}: {name} has shape {value.shape}, but content={manifest.content} "
                    f"with shape={manifest.shape} needs {manifest.array_shape}"
                )
            if value.dtype not in (np.float16, np.float32):
                raise UserError(f"sample {key}: {name} is {value.dtype}; use float16 or float32")
            if not np.isfinite(value).all():
                raise UserError(f"sample {key}: {name} holds NaN or infinity; leave the sample out")
        if self._tar is None:
            self._start_shard()
        if key in self._keys:
            raise UserError(f"sample key {key!r} comes twice in one shard; keys must be unique")
        self._keys.add(key)
        members = {name: _npy(value) for name, value in arrays.items()}
        self._tar.write({"__key__": key, **members, "cls": str(int(label)).encode()})
        if len(self._keys) == self._planned():
            self._finish_shard()

    def _planned(self) -> int:
        """How many samples the shard that is being written takes."""
        if isinstance(self._sizes, int):
            return self._sizes
        index = len(self.manifest.shards)
        if index == len(self._sizes):
            raise ValueError(f"more than the {sum(self._sizes)} planned samples came")
        return self._sizes[index]

    def _start_shard(self) -> None:
        self._planned()
        self._path = self.directory / f"{len(self.manifest.shards):06d}.tar"
        self._file = open(f"{self._path}.tmp", "wb")  # noqa: SIM115 (closed in _finish_shard)
        self._tar = webdataset.TarWriter(
            self._file, user="diffmoe", group="diffmoe", mode=0o644, mtime=0, encoder=False
        )
        self._keys = set()

    def _finish_shard(self) -> None:
        self._tar.close()
        self._tar = None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        temporary = Path(self._file.name)
        shard = Shard(
            name=self._path.name,
            samples=len(self._keys),
            bytes=temporary.stat().st_size,
            sha256=sha256_of(temporary),
        )
        os.replace(temporary, self._path)
        self.manifest.shards.append(shard)

    def _abandon(self) -> None:
        """After an error: drop the torn file. Finished shards stay, without a manifest."""
        if self._tar is not None:
            self._tar.close()
            self._file.close()
            Path(self._file.name).unlink()


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
