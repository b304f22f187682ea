"""A folder of many images, made by any number of ranks: shards of uint8 images, resumable.

`samples-000000.npz` ... hold images (n, H, W, C), their labels and indices, and the capacity of the
evaluations that made them. `samples.json`, written when all shards are there, lists them with
checksums beside everything that determines the images. The content of shard s follows from the
settings alone, so ranks need no process group, unless they share the experts: then each such group
makes a shard together.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from diffmoe.capacity.meter import CapacityByTime, merged
from diffmoe.diffusion.samplers import Progress
from diffmoe.errors import UserError
from diffmoe.files import contained, read_json, sha256_of
from diffmoe.npz_files import read_npz, write_npz
from diffmoe.parallel.topology import Topology
from diffmoe.sampling.images import SampledImages
from diffmoe.sampling.sharing import equal_share
from diffmoe.seeding import keyed_generator
from diffmoe.work import Ranks, Records, ensure_writable, remove_stale_files, write_json_once

MANIFEST = "samples.json"
RECORDS = ".sampling"  # folder of what is done
LATENTS = "latents"  # content of shards for a decoder that lies elsewhere
SHARD_SIZE = 50  # images that a stop may cost
# Numbers of images and a callback for those done -> the images.
Make = Callable[[Sequence[int], Progress], SampledImages]


@dataclass(frozen=True)
class SampleRequest:
    """Which images to make: their number and labels. Image k has label `label(k)`.

    classes: to choose from; of a text model the numbers of its captions. labels: "balanced" takes
    them in turn, "random" draws each.
    """

    number: int
    classes: tuple[int, ...]
    labels: str = "balanced"

    def label(self, index: int, seed: int) -> int:
        if self.labels == "balanced":
            return self.classes[index % len(self.classes)]
        generator = keyed_generator(seed, "label", index)
        return self.classes[int(torch.randint(len(self.classes), (), generator=generator))]

    def all_labels(self, seed: int) -> list[int]:
        return [self.label(index, seed) for index in range(self.number)]


class SampleResult(NamedTuple):
    """A finished folder: its manifest, and C by time (None without experts).

    closes: True on one of the ranks that see the folder finished: that one reports, and writes
    other formats.
    """

    manifest: dict[str, Any]
    capacity: CapacityByTime | None
    closes: bool


def fill_folder(
    folder: Path,
    request: SampleRequest,
    plan: dict[str, Any],
    make: Make,
    topology: Topology,
    ranks: Ranks,
) -> SampleResult | None:
    """Make the images that are missing. Returns None while other ranks still work.

    plan: everything that determines the images, for samples.json; a folder that was begun with
    another plan is refused. make: images by their numbers.
    """
    number, shard_size = request.number, plan["shard_size"]
    sharing = topology.expert_parallel
    team, teams = ranks.rank // sharing, ranks.world // sharing
    starts = range(0, number, shard_size)
    was_finished = (folder / MANIFEST).exists()
    records = Records(folder, RECORDS)
    _begin(folder, records, plan)
    mine = range(team, len(starts), teams)
    done = {part for part in range(len(starts)) if _is_there(records, part)}
    if len(done) < len(starts):  # a shard of a finished folder is gone
        (folder / MANIFEST).unlink(missing_ok=True)
        was_finished = False
    missing = _agreed(topology, [part for part in mine if part not in done])
    sizes = [min(shard_size, number - start) for start in starts]
    with tqdm(
        total=sum(sizes[part] for part in mine),
        initial=sum(sizes[part] for part in mine if part in done),
        unit="image",
        dynamic_ncols=True,
        disable=ranks.rank != 0 or None,  # None: where stderr is no terminal
    ) as bar:
        for part in missing:
            indices = range(starts[part], starts[part] + sizes[part])
            made = _make_together(make, indices, topology, bar)
            if topology.expert_rank == 0:
                labels = [request.label(index, plan["seed"]) for index in indices]
                record = _save(folder, part, made, labels, indices)
                if made.evaluations is not None:
                    record["evaluations"] = made.evaluations
                records.write(part, record)
    result = _finish(folder, records, plan, len(starts))
    if result is not None and was_finished:
        return result._replace(closes=ranks.rank == 0)
    return result


def shard_size_of(folder: Path) -> int:
    """As the folder was begun with, else the default."""
    return Records(folder, RECORDS).plan().get("shard_size", SHARD_SIZE)


def _begin(folder: Path, records: Records, plan: dict[str, Any]) -> None:
    # Another rank may be about to begin: its records and its probe are not files of somebody else.
    others = {path.name for path in folder.glob("*") if path.suffix != ".tmp"}
    if others - {records.folder.name} and not records.begun:
        raise UserError(
            f"{folder} holds files, but was not begun by this command; choose an empty --out"
        )
    ensure_writable(folder)
    way_out = "use the same, or choose another folder (--out)"
    records.begin(plan, way_out, absent={"dtype": "fp32"})  # folders of before have none
    remove_stale_files(folder)
    remove_stale_files(records.folder)


def _agreed(topology: Topology, missing: list[int]) -> list[int]:
    """The shards to make. Ranks that share experts take those that the first one sees missing."""
    group = topology.expert_group
    if topology.expert_parallel == 1 or group is None:
        return missing
    shared = [missing]
    dist.broadcast_object_list(shared, src=dist.get_global_rank(group, 0), group=group)
    return shared[0]


def _make_together(make: Make, indices: range, topology: Topology, bar: tqdm) -> SampledImages:
    """The images `indices`; each of the ranks that share the experts makes an equal share."""
    mine = equal_share(indices, topology.expert_rank, topology.expert_parallel)
    begun, total = bar.n, bar.total or 0

    def progress(done: float) -> None:
        bar.update(min(round(begun + done * topology.expert_parallel), total) - bar.n)

    made = make(mine, progress)
    if topology.expert_parallel == 1:
        return made
    parts: list[Any] = [None] * topology.expert_parallel
    dist.all_gather_object(parts, made, group=topology.expert_group)
    images = torch.cat([part.images for part in parts])[: len(indices)]
    capacity = merged([part.capacity for part in parts]) if made.capacity else None
    return SampledImages(images, capacity)


def _file(folder: Path, part: int) -> Path:
    return folder / f"samples-{part:06d}.npz"


def _is_there(records: Records, part: int) -> bool:
    """Whether a shard has its record and a file of the recorded size."""
    if not records.has(part):
        return False
    file = _file(records.directory, part)
    return file.exists() and file.stat().st_size == records.read(part)["bytes"]


def _save(
    folder: Path, part: int, made: SampledImages, labels: Sequence[int], indices: range
) -> dict[str, Any]:
    """Write a shard atomically. Returns its record."""
    file = _file(folder, part)
    images = made.images.numpy()
    content = "images" if images.dtype == np.uint8 else LATENTS
    arrays = {content: images, "labels": np.array(labels), "indices": np.array(indices)}
    if made.capacity is not None:
        arrays |= {name: tensor.numpy() for name, tensor in made.capacity._asdict().items()}
    write_npz(file, arrays)
    return {
        "file": file.name,
        "samples": len(images),
        "bytes": file.stat().st_size,
        "sha256": sha256_of(file),
    }


def _finish(
    folder: Path, records: Records, plan: dict[str, Any], parts: int
) -> SampleResult | None:
    """Write the manifest if every shard is there."""
    if not all(_is_there(records, part) for part in range(parts)):
        return None
    shards = [records.read(part) for part in range(parts)]
    seen = []
    for shard in shards:
        arrays = read_npz(folder / shard["file"])
        shape = arrays[plan.get("content", "images")].shape[1:]
        if "capacity" in arrays:
            tensors = (torch.from_numpy(arrays[name].copy()) for name in CapacityByTime._fields)
            seen.append(CapacityByTime(*tensors))
    capacity = merged(seen) if seen else None
    manifest = {
        **json.loads(json.dumps(plan)),  # tuples become lists, as in the file
        "image_shape": list(shape),
        **({} if "content" in plan else {"uint8": "round(127.5 x + 127.5), clamped to 0..255"}),
        "capacity_average": capacity and capacity.average,
        "shards": shards,
    }
    evaluations = [shard["evaluations"] for shard in shards if "evaluations" in shard]
    if evaluations:
        manifest["evaluations"] = sum(evaluations) / len(evaluations)
    return SampleResult(manifest, capacity, write_json_once(folder / MANIFEST, manifest))


def read_manifest(folder: Path) -> dict[str, Any]:
    """samples.json of a finished folder. Raises UserError where it is missing or damaged."""
    file = folder / MANIFEST
    if not file.exists():
        raise UserError(f"{folder} holds no {MANIFEST}: not all samples are there; run it again")
    manifest = read_json(file)
    try:
        if type(manifest["number"]) is not int:
            raise ValueError(f"number={manifest['number']!r}")
        if not manifest["shards"]:
            raise ValueError("it lists no shards")
        for shard in manifest["shards"]:
            contained(folder, shard["file"])
            str(shard["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error}); sample into another folder"
        ) from None
    return manifest


def shard_arrays(folder: Path, check: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The (images, labels) of each shard of a finished folder, in order of their indices.

    check: compare each file with its checksum. Raises UserError if the folder is not finished, or
    a shard is missing or damaged.
    """
    manifest = read_manifest(folder)
    if manifest.get("content") == LATENTS:
        raise UserError(
            f"{folder} holds latents of {manifest.get('autoencoder')}, not images; decode "
            "them, and give the folder of the images"
        )
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or (check and sha256_of(path) != shard["sha256"]):
            raise UserError(f"{path} is missing or damaged; remove it and sample again")
        arrays = read_npz(path, "images", "labels")
        if len(arrays) < 2 or len(arrays["images"]) != arrays["labels"].size:
            raise UserError(f"{path} does not hold images with a label each; sample again")
        yield arrays["images"], arrays["labels"]
