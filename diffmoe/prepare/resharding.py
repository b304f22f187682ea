"""Rewrite a data folder: into another number of shards, into two folders, or with new captions."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from diffmoe.data.captions import FEATURES, Captions, caption_lines
from diffmoe.data.fetching import Unreadable, open_shard
from diffmoe.data.latents import Sample
from diffmoe.data.manifest import Manifest, is_url
from diffmoe.data.reading import unreadable
from diffmoe.data.tar_index import Member, read_member, tar_entries
from diffmoe.errors import UserError
from diffmoe.npz_files import decode_npy
from diffmoe.prepare.sharding import ShardOutput, convert_items
from diffmoe.redaction import redact


class PackedItem(NamedTuple):
    """A sample in a shard."""

    name: str
    path: str
    members: dict[str, Member]


def reshard(directory: str | Path, output: ShardOutput) -> Manifest | None:
    """Rewrite into equal shards; arrays, labels and captions stay bit-identical.

    Returns the new manifest, or None while other ranks are still working. Raises UserError.
    """
    return rewrite(directory, output, iter)


def hold_out(
    directory: str | Path, samples: int, train: ShardOutput, held_out: ShardOutput
) -> tuple[Manifest | None, Manifest | None]:
    """Rewrite into two folders: `samples` samples into the second, the others into the first.

    A sample's key alone decides, by its hash, so no class and no shard is preferred, and a folder
    that grows keeps most of its choice. Raises UserError.
    """
    total = Manifest.load(directory).samples
    if not 0 < samples < total:
        raise UserError(f"--hold-out {samples}: choose from 1 to {total - 1}, of {total} samples")
    if Path(train.directory).resolve() == Path(held_out.directory).resolve():
        raise UserError(f"{train.directory} cannot hold both parts; choose two folders")

    def by_hash(items: list[PackedItem]) -> list[PackedItem]:
        return sorted(items, key=lambda item: hashlib.sha256(item.name.encode()).digest())

    return (
        rewrite(directory, train, iter, choose=lambda items: by_hash(items)[samples:]),
        rewrite(directory, held_out, iter, choose=lambda items: by_hash(items)[:samples]),
    )


def rewrite(
    directory: str | Path,
    output: ShardOutput,
    change: Callable[[Iterator[Sample]], Iterator[Sample]],
    *,
    choose: Callable[[list[PackedItem]], list[PackedItem]] = list,
    changes: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
) -> Manifest | None:
    """Write the samples in a new order, after `change`, which gets those of one new shard.

    output: by default with as many shards as there are now, at most one a sample.
    choose: which samples to write.
    changes: to the manifest; if it then has a `text`, samples come with their captions.
    settings: see `convert_items`.
    """
    manifest, out = Manifest.load(directory), output.directory
    if Path(out).resolve() == Path(directory).resolve():
        raise UserError(f"--out {out} is also the input; choose another folder")
    items: list[PackedItem] = []
    for shard in manifest.shards:
        address = manifest.address(directory, shard)
        if is_url(address):
            raise UserError(f"{redact(address)} is not a file; copy the shards here first")
        try:
            with open_shard(address, shard, attempts=1) as file:
                entries = tar_entries(file.fileno())
        except (Unreadable, ValueError) as error:
            raise UserError(unreadable(address, str(error))) from None
        items += [PackedItem(entry.key, address, entry.members) for entry in entries]
    items = choose(items)
    fields = manifest.model_dump(exclude={"version", "shards", "skipped", "location"})
    fields |= changes or {}
    names = [f"{manifest.member}.npy"] + [f"{manifest.member}_flip.npy"] * manifest.stores_flips
    of_image = manifest.feature_members

    def read(item: PackedItem) -> Sample:
        try:
            with open(item.path, "rb") as stream:
                raw = {
                    name: read_member(stream.fileno(), member)
                    for name, member in item.members.items()
                    if name in (*names, *FEATURES, *of_image, "txt", "cls")
                }
            array, *flip = (decode_npy(raw[name]) for name in names)
            sample = Sample(
                item.name,
                int(raw["cls"]),
                array,
                flip[0] if flip else None,
                features=tuple(decode_npy(raw[name]) for name in of_image),
            )
            if fields["text"] is None:
                return sample
            features = (decode_npy(raw[name]) if name in raw else None for name in FEATURES)
            return sample._replace(captions=Captions(caption_lines(raw["txt"]), *features))
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{item.path}, sample {item.name} is broken ({error}); see what "
                f"tools/check_data.py {directory} reports"
            ) from None

    def convert(part: Sequence[PackedItem]) -> Iterator[Sample]:
        return change(read(item) for item in part)

    if output.shards is None:
        output = replace(output, shards=min(len(manifest.shards), len(items)))
    new = convert_items(items, convert, fields, output, settings)
    if new is not None and new.skipped != manifest.skipped:
        new.skipped = manifest.skipped
        new.save(out)
    return new
