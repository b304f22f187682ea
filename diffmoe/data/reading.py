"""An open shard: its samples by index, each read and decoded on demand."""

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from diffmoe.config import BYTES
from diffmoe.data.captions import Captions, caption_lines, check_captions
from diffmoe.data.fetching import Unreadable, open_shard
from diffmoe.data.latents import Sample, check_features, from_stored, stored_types
from diffmoe.data.manifest import FILE_NAME, Manifest, Shard
from diffmoe.data.tar_index import Member, read_member, tar_entries
from diffmoe.errors import UserError
from diffmoe.npz_files import decode_npy
from diffmoe.redaction import printable, redact


class OpenShard:
    """The samples of a shard in file order. Keeps their positions in the file, not their contents.

    Labels and the presence of all members are checked on opening, arrays when they are read.
    Raises UserError where the shard does not fit its manifest.
    """

    def __init__(self, file: BinaryIO, shard: Shard, manifest: Manifest, address: str):
        self.manifest, self.shown = manifest, printable(redact(address))
        self._file, self._number = file, file.fileno()
        try:
            entries = tar_entries(self._number)
        except ValueError as error:
            raise UserError(
                f"shard {self.shown} is not a complete tar ({error}); pack the data again"
            ) from None
        if len(entries) != shard.samples:
            raise UserError(
                f"shard {self.shown} holds {len(entries)} samples, {shard.samples} in {FILE_NAME}; "
                "copy it again or pack the data again"
            )
        self.keys = [entry.key for entry in entries]
        self._members = [entry.members for entry in entries]
        self._names = [f"{manifest.member}.npy"]
        if manifest.stores_flips:
            self._names.append(f"{manifest.member}_flip.npy")
        self._text_names = _text_members(manifest)
        self.labels = [self._label(index) for index in range(len(entries))]

    def __len__(self) -> int:
        return len(self.keys)

    def array(self, index: int, mirrored: bool = False) -> np.ndarray:
        """The array (C,H,W) or (2C,H,W) of a sample or of its mirror image; read-only.

        Raises UserError if it cannot be decoded or does not fit the manifest.
        """
        manifest = self.manifest
        turn = mirrored and not manifest.stores_flips
        name = self._names[mirrored and not turn]
        try:
            array = decode_npy(read_member(self._number, self._members[index][name]))
        except ValueError as error:
            raise UserError(
                f"{self.where(index)}: {name} cannot be decoded ({error}); pack the data again"
            ) from None
        if array.shape != manifest.array_shape:
            raise UserError(
                f"{self.where(index)}: {name} has shape {array.shape}, but {FILE_NAME} says "
                f"content={manifest.content}, shape={manifest.shape}, so {manifest.array_shape}; "
                "fix the manifest or pack the data again"
            )
        if array.dtype not in stored_types(manifest.dtype):
            raise UserError(
                f"{self.where(index)}: {name} is {array.dtype}, but {FILE_NAME} says dtype="
                f"{manifest.dtype}, so {' or '.join(map(str, stored_types(manifest.dtype)))}; "
                "fix the manifest or pack the data again"
            )
        return array[..., ::-1] if turn else array

    def captions(self, index: int) -> Captions:
        """All captions of a sample with their features, checked against the manifest's text."""
        members = self._members[index]
        try:
            raw = {name: read_member(self._number, members[name]) for name in self._text_names}
            arrays = {name: decode_npy(raw[name]) for name in self._text_names[1:]}
            captions = Captions(
                caption_lines(raw["txt"]),
                arrays.get("text.npy"),
                arrays.get("text_lengths.npy"),
                arrays.get("text_pooled.npy"),
            )
            assert self.manifest.text is not None
            check_captions(captions, self.manifest.text)
        except ValueError as error:
            raise UserError(f"{self.where(index)}: {error}; pack the data again") from None
        return captions

    def features(self, index: int, mirrored: bool = False) -> np.ndarray:
        """The image encoder's features (Z,h,w) of a sample or of its mirror image, float16.

        Raises UserError if they cannot be decoded, do not fit the manifest or are not finite.
        """
        content, name = self.manifest.features, self.manifest.feature_members[mirrored]
        assert content is not None
        try:
            array = decode_npy(read_member(self._number, self._members[index][name]))
            check_features(array, content)
        except ValueError as error:
            raise UserError(
                f"{self.where(index)}: {name}: {error}; encode the features again"
            ) from None
        return array

    def sample(self, index: int) -> Sample:
        """A sample without captions and features. Raises UserError if a number is not finite."""
        manifest = self.manifest
        arrays = [self.array(index, mirrored) for mirrored in (False, True)[: 1 + manifest.flips]]
        for array in arrays:
            if not np.isfinite(from_stored(array, manifest.dtype)).all():
                raise self.not_finite(index)
        return Sample(
            self.keys[index], self.labels[index], arrays[0], arrays[1] if arrays[1:] else None
        )

    def where(self, index: int) -> str:
        """The shard and the sample, for messages."""
        return f"shard {self.shown}, sample {self.keys[index]}"

    def not_finite(self, index: int) -> UserError:
        """The error for a sample with NaN or infinity."""
        return UserError(
            f"{self.where(index)}: NaN or infinity in the data; pack the data again without this "
            "sample"
        )

    def close(self) -> None:
        self._file.close()

    def _label(self, index: int) -> int:
        members: dict[str, Member] = self._members[index]
        manifest = self.manifest
        wanted = [*self._names, *self._text_names, *manifest.feature_members, "cls"]
        missing = [name for name in wanted if name not in members]
        if missing:
            expected = f"content={manifest.content}, flips={manifest.flips}"
            if manifest.text is not None:
                expected += f", text={manifest.text}"
            if manifest.features is not None:
                expected += f", features={manifest.features}"
            raise UserError(
                f"{self.where(index)}: {missing[0]} is missing (there is "
                f"{', '.join(sorted(members))}), but {FILE_NAME} says {expected}; fix the manifest "
                "or pack the data again"
            )
        text = b""
        try:
            text = read_member(self._number, members["cls"])
            label = int(text)
        except ValueError:
            raise UserError(
                f"{self.where(index)}: cls cannot be decoded ({text[:20]!r} is not a number); pack "
                "the data again"
            ) from None
        if not 0 <= label < manifest.classes:
            raise UserError(
                f"{self.where(index)}: label {label} is outside the classes "
                f"0..{manifest.classes - 1} of {FILE_NAME} (classes={manifest.classes}); fix the "
                "manifest or pack the data again"
            )
        return label


def _text_members(manifest: Manifest) -> list[str]:
    """The members that carry a sample's captions, `txt` first."""
    text = manifest.text
    if text is None:
        return []
    features = [] if text.encoder == BYTES else ["text.npy", "text_lengths.npy"]
    return ["txt", *features, *(["text_pooled.npy"] if text.pooled else [])]


def read_shard(path: str | Path, manifest: Manifest) -> list[Sample]:
    """Read all samples of a shard, in file order, and check them against the manifest.

    Raises UserError.
    """
    shard = _listed(path, manifest)
    try:
        file = open_shard(os.path.abspath(path), shard, attempts=1)
    except Unreadable as error:
        raise UserError(unreadable(str(path), str(error))) from None
    with file:
        opened = OpenShard(file, shard, manifest, str(path))
        return [opened.sample(index) for index in range(len(opened))]


def unreadable(address: str, reason: str) -> str:
    """The message about an unreadable shard, with secrets removed from its address."""
    shown, why = printable(redact(address)), printable(redact(reason))
    return f"shard {shown} cannot be read ({why}); copy it again or pack the data again"


def _listed(path: str | Path, manifest: Manifest) -> Shard:
    """The manifest's entry for the shard at `path`."""
    parts = Path(path).parts
    fits = [
        shard
        for shard in manifest.shards
        if parts[-len(Path(shard.name).parts) :] == Path(shard.name).parts
    ]
    if not fits:
        raise UserError(f"shard {path} is not listed in {FILE_NAME}; pack the data again")
    return max(fits, key=lambda shard: len(shard.name))
