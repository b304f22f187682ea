"""The samples of a data folder written anew: in another number of shards, or with new captions."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffmoe.data.captions import FEATURES, Captions, caption_lines
from diffmoe.data.fetching import Unreadable, open_shard
from diffmoe.data.manifest import Manifest, is_url
from diffmoe.data.reading import unreadable
from diffmoe.data.tar_index import Member, read_member, tar_entries
from diffmoe.errors import UserError
from diffmoe.npz_files import decode_npy
from diffmoe.prepare.sharding import Made, convert_items
from diffmoe.redaction import redact
from diffmoe.work import Ranks


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
    """Rewrite into `shards` equal shards; arrays, labels and captions stay bit for bit.

    Returns the new manifest, or None while other ranks still work.
    """
    return rewrite(directory, out, iter, shards=shards, overwrite=overwrite, ranks=ranks)


def rewrite(
    directory: str | Path,
    out: str | Path,
    change: Callable[[Iterator[Made]], Iterator[Made]],
    *,
    changes: dict[str, Any] | None = None,
    shards: int | None = None,
    settings: dict[str, Any] | None = None,
    overwrite: bool = False,
    ranks: Ranks = Ranks(),  # noqa: B008 (a tuple)
) -> Manifest | None:
    """Write the samples, mixed anew, after `change`, which is given those of one new shard.

    changes: to the manifest; if it has a `text` then, samples come with their captions.
    shards: by default as many as there are. settings: see `convert_items`.
    """
    manifest = Manifest.load(directory)
    if Path(out).resolve() == Path(directory).resolve():
        raise UserError(f"--out {out} is the folder that is read; choose another")
    items: list[PackedItem] = []
    for shard in manifest.shards:
        address = manifest.address(directory, shard)
        if is_url(address):
            raise UserError(f"{redact(address)} is no file; copy the shards here first")
        try:
            with open_shard(address, shard, attempts=1) as file:
                entries = tar_entries(file.fileno())
        except (Unreadable, ValueError) as error:
            raise UserError(unreadable(address, str(error))) from None
        items += [PackedItem(entry.key, address, entry.members) for entry in entries]
    fields = manifest.model_dump(exclude={"version", "shards", "skipped", "location"})
    fields |= changes or {}
    names = [f"{manifest.member}.npy"] + [f"{manifest.member}_flip.npy"] * manifest.stores_flips

    def sample(item: PackedItem) -> Made:
        try:
            with open(item.path, "rb") as stream:
                raw = {
                    name: read_member(stream.fileno(), member)
                    for name, member in item.members.items()
                    if name in (*names, *FEATURES, "txt", "cls")
                }
            made = Made(item.name, int(raw["cls"]), *(decode_npy(raw[name]) for name in names))
            if fields["text"] is None:
                return made
            features = (decode_npy(raw[name]) if name in raw else None for name in FEATURES)
            return made._replace(captions=Captions(caption_lines(raw["txt"]), *features))
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{item.path}, sample {item.name} is broken ({error}); see what "
                f"tools/check_data.py {directory} says"
            ) from None

    def convert(part: Sequence[PackedItem]) -> Iterator[Made]:
        return change(sample(item) for item in part)

    made = convert_items(
        out,
        items,
        convert,
        fields=fields,
        shards=len(manifest.shards) if shards is None else shards,
        settings=settings,
        overwrite=overwrite,
        ranks=ranks,
    )
    if made is not None and made.skipped != manifest.skipped:
        made.skipped = manifest.skipped
        made.save(out)
    return made
