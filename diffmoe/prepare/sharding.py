"""Many items into shards: on any number of ranks, and to go on after a kill at any moment.

What shard s holds is fixed before the work begins: the items in an order that depends on their
number alone, cut into equal parts. Rank r of W makes the shards r, r+W, ...; it needs no other rank
and no process group. A finished shard has a record in `.packing/`, written after the tar has its
name, so whatever lacks one is made again. Whoever sees all the records writes the manifest.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from tqdm import tqdm

from diffmoe.data.captions import Captions
from diffmoe.data.manifest import FILE_NAME, Manifest, Shard
from diffmoe.data.packing import ShardFile, clear, shard_name, shard_sizes
from diffmoe.errors import UserError
from diffmoe.seeding import keyed_generator
from diffmoe.work import Ranks, Records, remove_stale_files


class Item(Protocol):
    """What a sample is made of: a file, a part of one."""

    @property
    def name(self) -> str:
        """Shown where the item is skipped; unique."""


class Made(NamedTuple):
    """A sample for a shard."""

    key: str
    label: int
    array: np.ndarray
    flip: np.ndarray | None = None
    captions: Captions | None = None


class Skipped(NamedTuple):
    """An item that cannot be used."""

    name: str
    reason: str


# The samples of one shard's items, in order; no sample may depend on other shards.
Convert = Callable[[Sequence[Any]], Iterator[Made | Skipped]]


def default_shards(items: int) -> int:
    """One shard per 1,000 samples, but enough for the lanes of a run."""
    return max(1, min(items, max(32, -(-items // 1000))))


def convert_items(
    directory: str | Path,
    items: Sequence[Item],
    convert: Convert,
    *,
    fields: dict[str, Any],
    shards: int | None = None,
    settings: dict[str, Any] | None = None,
    ranks: Ranks = Ranks(),  # noqa: B008 (a tuple)
    max_bad: int = 0,
    overwrite: bool = False,
) -> Manifest | None:
    """Pack `items` into `directory`. Returns the manifest, or None while other ranks still work.

    fields: those of Manifest, without shards and skipped.
    settings: whatever else decides the bytes (a batch size, ...); a half-done folder of other
        fields, items or settings is refused.
    max_bad: how many items may be skipped; more stop the work.
    """
    directory = Path(directory)
    if not items:
        raise UserError(f"nothing to pack into {directory}: no items were found")
    sizes = shard_sizes(len(items), default_shards(len(items)) if shards is None else shards)
    names = hashlib.sha256("\n".join(item.name for item in items).encode()).hexdigest()
    plan = {
        **Manifest(shards=[], **fields).model_dump(mode="json", exclude={"shards", "skipped"}),
        **(settings or {}),
        "items": len(items),
        "names": names,
        "number of shards": len(sizes),
    }
    records = Records(directory, ".packing")
    _begin(records, plan, overwrite, ranks)

    order = torch.randperm(len(items), generator=keyed_generator(len(items), "packing")).tolist()
    starts = np.cumsum([0, *sizes]).tolist()
    mine = range(ranks.rank, len(sizes), ranks.world)
    missing = [shard for shard in mine if not records.has(shard)]
    with tqdm(
        total=sum(sizes[shard] for shard in mine),
        initial=sum(sizes[shard] for shard in mine if shard not in set(missing)),
        unit="image",
        dynamic_ncols=True,
        disable=ranks.rank != 0 or None,  # None: where stderr is no terminal
    ) as bar:
        for shard in missing:
            part = [items[index] for index in order[starts[shard] : starts[shard + 1]]]
            budget = max_bad - len(_skipped(records, len(sizes)))
            made, skipped = _pack(directory / shard_name(shard), part, convert, fields, budget, bar)
            records.write(shard, {"shard": made and made.model_dump(), "skipped": skipped})
    return _finish(records, len(sizes), fields, max_bad)


def _begin(records: Records, plan: dict, overwrite: bool, ranks: Ranks) -> None:
    """Begin afresh, or see that what is there belongs to the same work."""
    directory = records.directory
    if overwrite:
        if ranks.world > 1:
            raise UserError(
                f"--overwrite with {ranks.world} ranks: one could remove what another has just "
                f"made; remove {directory} first"
            )
        records.clear()
    if not records.begun:
        clear(directory, overwrite)
    records.begin(plan, "use the same, choose another folder, or overwrite it (--overwrite)")
    remove_stale_files(directory)


def _pack(
    path: Path,
    items: Sequence[Item],
    convert: Convert,
    fields: dict[str, Any],
    budget: int,
    bar: tqdm,
) -> tuple[Shard | None, list[str]]:
    """Make one shard. Returns it (None if nothing was left for it) and what was skipped."""
    file = ShardFile(path, Manifest(shards=[], **fields))
    skipped: list[str] = []
    try:
        for result in convert(items):
            bar.update()
            if isinstance(result, Made):
                file.add(*result)
                continue
            skipped.append(f"{result.name}: {result.reason}")
            if len(skipped) > budget:
                _refuse(skipped)
    except BaseException:
        file.abandon()
        raise
    if len(file) == 0:
        file.abandon()
        return None, skipped
    return file.close(), skipped


def _finish(records: Records, shards: int, fields: dict[str, Any], max_bad: int) -> Manifest | None:
    """Write the manifest if every shard is there."""
    directory = records.directory
    if (directory / FILE_NAME).exists():
        return Manifest.load(directory)
    if not all(records.has(shard) for shard in range(shards)):
        return None
    skipped = _skipped(records, shards)
    if len(skipped) > max_bad:
        _refuse(skipped)
    done = [records.read(shard) for shard in range(shards)]
    made = [record["shard"] for record in done if record["shard"] is not None]
    if not made:
        raise UserError(
            f"no item could be used for {directory}: {skipped[0]}. Mend them and begin anew "
            "(--overwrite)"
        )
    manifest = Manifest(shards=made, skipped=skipped, **fields)
    manifest.save(directory)
    return manifest


def _refuse(skipped: list[str]) -> None:
    raise UserError(
        "more items are unusable than --max-bad allows, the last ones: "
        f"{'; '.join(skipped[-3:])}. Mend or remove them, or raise --max-bad: finished shards are "
        "kept, and the same command goes on"
    )


def _skipped(records: Records, shards: int) -> list[str]:
    """What all ranks have skipped so far."""
    done = [records.read(shard) for shard in range(shards) if records.has(shard)]
    return [line for record in done for line in record["skipped"]]
