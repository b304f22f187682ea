"""The samples of a data folder in another number of shards, mixed anew."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from diffmoe.data.conversion import Made, convert_items
from diffmoe.data.fetching import Unreadable, open_shard
from diffmoe.data.manifest import Manifest, is_url
from diffmoe.data.reading import decode_npy, unreadable
from diffmoe.data.tar_index import Member, read_member, tar_entries
from diffmoe.errors import UserError
from diffmoe.resumable import Ranks


class PackedItem(NamedTuple):
    """A sample in a shard."""

    name: str
    path: str
    members: dict[str, Member]


def reshard(
    directory: str | Path,
    out: str | Path,
    shards: int,
    *,
    overwrite: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 (a tuple)
) -> Manifest | None:
    """Rewrite into `shards` equal shards; arrays and labels stay bit for bit.

    Returns the new manifest, or None while other ranks still work.
    """
    manifest = Manifest.load(directory)
    if Path(out).resolve() == Path(directory).resolve():
        raise UserError(f"--out {out} is the folder that is read; choose another")
    items: list[PackedItem] = []
    for shard in manifest.shards:
        address = manifest.address(directory, shard)
        if is_url(address):
            raise UserError(f"{address} is no file; copy the shards here first")
        try:
            with open_shard(address, shard, attempts=1) as file:
                entries = tar_entries(file.fileno())
        except (Unreadable, ValueError) as error:
            raise UserError(unreadable(address, str(error))) from None
        items += [PackedItem(entry.key, address, entry.members) for entry in entries]
    names = [f"{manifest.member}.npy"] + [f"{manifest.member}_flip.npy"] * manifest.flips

    def convert(part: Sequence[PackedItem]) -> Iterator[Made]:
        for item in part:
            with open(item.path, "rb") as stream:
                raw = {
                    name: read_member(stream.fileno(), item.members[name])
                    for name in [*names, "cls"]
                    if name in item.members
                }
            try:
                arrays = [decode_npy(raw[name]) for name in names]
                made = Made(item.name, int(raw["cls"]), *arrays)
            except (KeyError, ValueError) as error:
                raise UserError(
                    f"{item.path}, sample {item.name} is broken ({error}); see what "
                    f"tools/check_data.py {directory} says"
                ) from None
            yield made

    fields = manifest.model_dump(exclude={"version", "shards", "skipped", "location"})
    made = convert_items(
        out, items, convert, fields=fields, shards=shards, overwrite=overwrite, ranks=ranks
    )
    if made is not None and made.skipped != manifest.skipped:
        made.skipped = manifest.skipped
        made.save(out)
    return made
