"""Pack many items into shards: on any number of ranks, resumable after a kill at any moment.

The contents of shard s are fixed before the work begins: the items, in an order that depends only
on their number, are cut into equal parts. Rank r of W makes the shards r, r+W, ...; it needs no
other rank and no process group. A finished shard has a record in `.packing/`, written after the tar
got its name, so a shard without a record is made again. The rank that finds all records complete
writes the manifest.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from diffmoe.data.latents import Sample
from diffmoe.data.manifest import FILE_NAME, Manifest, Shard
from diffmoe.data.packing import ShardFile, clear, shard_name, shard_sizes
from diffmoe.errors import UserError
from diffmoe.seeding import keyed_generator
from diffmoe.work import Ranks, Records, remove_stale_files


@dataclass(frozen=True)
class ShardOutput:
    """Where shards are written, and how the work is divided.

    directory: of the shards and their manifest.
    shards: their number; None: see `default_shards`.
    max_bad: how many items may be skipped; more stop the work.
    overwrite: replace shards that are there, instead of refusing or resuming.
    """

    directory: str | Path
    shards: int | None = None
    max_bad: int = 0
    overwrite: bool = False
    ranks: Ranks = field(default_factory=Ranks)

    def summary(self, manifest: Manifest | None) -> str:
        """What to print at the end. manifest: None while other ranks are still working."""
        if manifest is None:
            rank, world = self.ranks
            return f"rank {rank} of {world} has finished; other ranks are still working"
        return manifest.summary(self.directory)


class Item(Protocol):
    """What a sample is made of: a file, or a part of one."""

    @property
    def name(self) -> str:
        """Reported if the item is skipped; unique."""


class Skipped(NamedTuple):
    """An item that cannot be used."""

    name: str
    reason: str


# The samples of one shard's items, in order; a sample must not depend on other shards.
Convert = Callable[[Sequence[Any]], Iterator[Sample | Skipped]]


def default_shards(items: int) -> int:
    """One shard per 1,000 samples, but at least 32, enough for the lanes of a run."""
    return max(1, min(items, max(32, -(-items // 1000))))


def convert_items(
    items: Sequence[Item],
    convert: Convert,
    fields: dict[str, Any],
    output: ShardOutput,
    settings: dict[str, Any] | None = None,
) -> Manifest | None:
    """Pack items into shards. Returns the manifest, or None while other ranks are still working.

    fields: those of Manifest except shards and skipped.
    settings: all else that decides the bytes (a batch size, ...). An unfinished folder of other
        fields, items or settings is refused.

    Raises UserError; finished shards are kept, and the same call resumes after them.
    """
    directory, ranks = Path(output.directory), output.ranks
    if not items:
        raise UserError(f"nothing to pack into {directory}: no items were found")
    shards = default_shards(len(items)) if output.shards is None else output.shards
    sizes = shard_sizes(len(items), shards)
    names = hashlib.sha256("\n".join(item.name for item in items).encode()).hexdigest()
    plan = {
        **Manifest(shards=[], **fields).model_dump(mode="json", exclude={"shards", "skipped"}),
        **(settings or {}),
        "items": len(items),
        "names": names,
        "number of shards": len(sizes),
    }
    records = Records(directory, ".packing")
    _begin(records, plan, output)

    order = torch.randperm(len(items), generator=keyed_generator(len(items), "packing")).tolist()
    starts = np.cumsum([0, *sizes]).tolist()
    mine = range(ranks.rank, len(sizes), ranks.world)
    missing = [shard for shard in mine if not records.has(shard)]
    with tqdm(
        total=sum(sizes[shard] for shard in mine),
        initial=sum(sizes[shard] for shard in mine if shard not in set(missing)),
        unit="image",
        dynamic_ncols=True,
        disable=ranks.rank != 0 or None,  # None: if stderr is not a terminal
    ) as bar:
        for number in missing:
            part = [items[index] for index in order[starts[number] : starts[number + 1]]]
            budget = output.max_bad - len(_skipped(records, len(sizes)))
            file = ShardFile(directory / shard_name(number), Manifest(shards=[], **fields))
            shard, skipped = _pack(file, part, convert, budget, bar)
            records.write(number, {"shard": shard and shard.model_dump(), "skipped": skipped})
    return _finish(records, len(sizes), fields, output.max_bad)


def _begin(records: Records, plan: dict[str, Any], output: ShardOutput) -> None:
    """Start from nothing, or check that the folder belongs to the same work."""
    directory = records.directory
    if output.overwrite:
        if output.ranks.world > 1:
            raise UserError(
                f"--overwrite with {output.ranks.world} ranks: one rank could remove what another "
                f"has just written; remove {directory} first"
            )
        records.clear()
    if not records.begun:
        clear(directory, output.overwrite)
    records.begin(plan, "use the same, choose another folder, or overwrite it (--overwrite)")
    remove_stale_files(directory)


def _pack(
    file: ShardFile, items: Sequence[Item], convert: Convert, budget: int, bar: tqdm
) -> tuple[Shard | None, list[str]]:
    """Write one shard. Returns it (None if no item was usable) and the skipped items.

    budget: how many items may be skipped.
    """
    skipped: list[str] = []
    try:
        for result in convert(items):
            bar.update()
            if isinstance(result, Sample):
                file.add(*result)
                continue
            skipped.append(f"{result.name}: {result.reason}")
            if len(skipped) > budget:
                raise _too_many(skipped)
    except BaseException:
        file.abandon()
        raise
    if len(file) == 0:
        file.abandon()
        return None, skipped
    return file.close(), skipped


def _finish(records: Records, shards: int, fields: dict[str, Any], max_bad: int) -> Manifest | None:
    """Write the manifest if every shard is finished."""
    directory = records.directory
    if (directory / FILE_NAME).exists():
        return Manifest.load(directory)
    if not all(records.has(shard) for shard in range(shards)):
        return None
    skipped = _skipped(records, shards)
    if len(skipped) > max_bad:
        raise _too_many(skipped)
    finished = [records.read(number)["shard"] for number in range(shards)]
    written = [shard for shard in finished if shard is not None]
    if not written:
        raise UserError(
            f"no item could be used for {directory}: {skipped[0]}. Fix the items and start again "
            "(--overwrite)"
        )
    manifest = Manifest(shards=written, skipped=skipped, **fields)
    manifest.save(directory)
    return manifest


def _too_many(skipped: list[str]) -> UserError:
    return UserError(
        "more items are unusable than --max-bad allows, the last ones: "
        f"{'; '.join(skipped[-3:])}. Fix or remove them, or raise --max-bad; finished shards are "
        "kept, and running the same command again resumes"
    )


def _skipped(records: Records, shards: int) -> list[str]:
    """What all ranks have skipped so far."""
    done = [records.read(shard) for shard in range(shards) if records.has(shard)]
    return [line for record in done for line in record["skipped"]]
