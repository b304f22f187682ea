"""Many samples on any number of ranks: shards of uint8 images, to go on with after any kill.

`samples-000000.npz` ... hold images (n, H, W, C), their labels and indices, and the capacity of the
passes that made them. `samples.json`, written when all are there, lists them with checksums beside
all that decides the images. What shard s holds follows from the settings alone, so ranks need no
process group, unless they share the experts: then each such group makes a shard together.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from diffmoe.capacity.meter import CapacityByTime, merged
from diffmoe.capacity.thresholds import hash_of
from diffmoe.config import Config
from diffmoe.diffusion.settings import SamplingSettings
from diffmoe.errors import UserError
from diffmoe.files import contained, read_bytes, read_json, sha256_of
from diffmoe.models.dit import DiT
from diffmoe.npz_files import read_npz, write_npz
from diffmoe.sampling.images import Decode, EvaluationCount, sample_images
from diffmoe.sampling.latents import check_sampling
from diffmoe.sampling.sharing import equal_share
from diffmoe.seeding import keyed_generator
from diffmoe.text.prompts import Prompts
from diffmoe.work import Ranks, Records, ensure_writable, remove_stale_files, write_json_once

MANIFEST = "samples.json"


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


class SampleResult(NamedTuple):
    """A finished folder: its manifest, and C by time (None without experts).

    closes: of all ranks that see it finished, the one that tells and writes other formats.
    """

    manifest: dict[str, Any]
    capacity: CapacityByTime | None
    closes: bool


def generate(
    folder: Path,
    network: DiT,
    config: Config,
    decode: Decode,
    order: SampleRequest,
    settings: SamplingSettings,
    *,
    model: dict[str, Any],
    prompts: Prompts | None = None,
    batch: int = 50,
    shard_size: int = 1000,
    ranks: Ranks = Ranks(),  # noqa: B008 (a tuple)
) -> SampleResult | None:
    """Make what is missing of the images. Returns None while other ranks still work.

    model: whatever else decides the images, see `identity`. A folder of another model, order,
    settings, prompts or shard size is refused; batch and ranks may change, unless an image depends
    on its batch (routing pooled or static, sampler dopri5).
    """
    sampler = check_sampling(network, config, order.classes, settings, prompts)
    if order.number < 1 or batch < 1 or shard_size < 1:
        raise UserError(
            f"{order.number} images in shards of {shard_size}, {batch} at a time: all at least 1"
        )
    sharing = network.topology.expert_parallel
    team, teams = ranks.rank // sharing, ranks.world // sharing
    starts = range(0, order.number, shard_size)
    was_finished = (folder / MANIFEST).exists()
    plan = {**asdict(order), **asdict(settings), "shard_size": shard_size, "model": model}
    if prompts is not None:
        plan |= {"captions": prompts.captions, "negative_prompt": prompts.negative}
    if sampler == "dopri5" or network.shares_compute:
        plan |= {"batch": batch, "expert_parallel": sharing}  # here an image depends on its batch
    records = Records(folder, ".sampling")
    _begin(folder, records, plan)
    mine = range(team, len(starts), teams)
    done = {part for part in range(len(starts)) if _is_there(records, part)}
    if len(done) < len(starts):  # where a shard has vanished, not all is there any more
        (folder / MANIFEST).unlink(missing_ok=True)
        was_finished = False
    missing = _agreed(network, [part for part in mine if part not in done])
    sizes = [min(shard_size, order.number - start) for start in starts]
    with tqdm(
        total=sum(sizes[part] for part in mine),
        initial=sum(sizes[part] for part in mine if part in done),
        unit="image",
        dynamic_ncols=True,
        disable=ranks.rank != 0 or None,  # None: where stderr is no terminal
    ) as bar:
        for part in missing:
            indices = range(starts[part], starts[part] + sizes[part])
            counted = EvaluationCount()
            images, capacity = _images(
                network, config, decode, order, settings, prompts, indices, batch, bar, counted
            )
            if network.topology.expert_rank == 0:
                labels = [order.label(index, settings.seed) for index in indices]
                record = _save(folder, part, images, labels, indices, capacity)
                if sampler == "dopri5":
                    record["evaluations"] = counted.mean
                records.write(part, record)
    made = _finish(folder, records, plan, len(starts))
    if made is not None and was_finished:
        return made._replace(closes=ranks.rank == 0)
    return made


def _begin(folder: Path, records: Records, plan: dict[str, Any]) -> None:
    # Another rank may be about to begin.
    others = {path.name for path in folder.glob("*")} - {records.folder.name}
    if others and not records.begun:
        raise UserError(
            f"{folder} holds files, but was not begun by this command; choose an empty --out"
        )
    ensure_writable(folder)
    records.begin(plan, "use the same, or choose another folder (--out)")
    remove_stale_files(folder)
    remove_stale_files(records.folder)


def _agreed(network: DiT, missing: list[int]) -> list[int]:
    """Ranks that share experts do the same work, whatever each of them sees of the folder."""
    if network.topology.expert_parallel == 1:
        return missing
    group = network.topology.expert_group
    told = [missing]
    dist.broadcast_object_list(told, src=dist.get_global_rank(group, 0), group=group)
    return told[0]


def _images(
    network: DiT,
    config: Config,
    decode: Decode,
    order: SampleRequest,
    settings: SamplingSettings,
    prompts: Prompts | None,
    indices: range,
    batch: int,
    bar: tqdm,
    counted: EvaluationCount,
) -> tuple[np.ndarray, CapacityByTime | None]:
    """The images `indices`; on all ranks that share the experts, each makes an equal share."""
    topology = network.topology
    mine = equal_share(indices, topology.expert_rank, topology.expert_parallel)
    begun = bar.n

    def progress(done: float) -> None:
        bar.update(min(round(begun + done * topology.expert_parallel), bar.total) - bar.n)

    labels = [order.label(index, settings.seed) for index in mine]
    images, capacity = sample_images(
        network,
        config,
        decode,
        labels,
        mine,
        settings,
        prompts=prompts,
        batch=batch,
        watch=counted,
        progress=progress,
    )
    if topology.expert_parallel > 1:
        told: list[Any] = [None] * topology.expert_parallel
        dist.all_gather_object(told, (images, capacity), group=topology.expert_group)
        images = torch.cat([part for part, _ in told])[: len(indices)]
        capacity = merged([part for _, part in told]) if capacity else None
    return images.numpy(), capacity


def _file(folder: Path, part: int) -> Path:
    return folder / f"samples-{part:06d}.npz"


def _is_there(records: Records, part: int) -> bool:
    """Whether a shard has its record, and the file the size that this says."""
    if not records.has(part):
        return False
    file = _file(records.directory, part)
    return file.exists() and file.stat().st_size == records.read(part)["bytes"]


def _save(
    folder: Path,
    part: int,
    images: np.ndarray,
    labels: Sequence[int],
    indices: range,
    capacity: CapacityByTime | None,
) -> dict[str, Any]:
    """Write a shard, whole or not at all; its record."""
    file = _file(folder, part)
    arrays = {"images": images, "labels": np.array(labels), "indices": np.array(indices)}
    if capacity is not None:
        arrays |= {name: tensor.numpy() for name, tensor in capacity._asdict().items()}
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
        shape = arrays["images"].shape[1:]
        if "capacity" in arrays:
            tensors = (torch.from_numpy(arrays[name].copy()) for name in CapacityByTime._fields)
            seen.append(CapacityByTime(*tensors))
    capacity = merged(seen) if seen else None
    manifest = {
        **json.loads(json.dumps(plan)),  # tuples become lists, as they are read again
        "image_shape": list(shape),
        "uint8": "round(127.5 x + 127.5), clamped to 0..255",
        "capacity_average": capacity and capacity.average,
        "shards": shards,
    }
    evaluations = [shard["evaluations"] for shard in shards if "evaluations" in shard]
    if evaluations:
        manifest["evaluations"] = sum(evaluations) / len(evaluations)
    return SampleResult(manifest, capacity, write_json_once(folder / MANIFEST, manifest))


def identity(folder: Path, network: DiT, weights: str, capacity: float | None) -> dict[str, Any]:
    """What decides the images beside order and settings, of a network that `set_capacity` has set.

    sha256: of the checkpoint's or model's checksums.json, which holds those of all its files.
    routing: None where the model has no choice.
    """
    listed = read_bytes(folder / "checksums.json")
    return {
        "checkpoint": folder.name,
        "sha256": hashlib.sha256(listed).hexdigest(),
        "weights": weights,
        "routing": network.routing and network.routing.kind,
        "capacity": capacity,
        "thresholds_sha256": hash_of(network),
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    """samples.json of a finished folder. Raises UserError where there is none, or a damaged one."""
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
    """Each shard's (images, labels) of a finished folder, in order of their indices.

    check: hold each file against its checksum. Raises UserError if the folder is not finished, or
    a shard is missing or damaged.
    """
    for shard in read_manifest(folder)["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or (check and sha256_of(path) != shard["sha256"]):
            raise UserError(f"{path} is missing or damaged; remove it and sample again")
        arrays = read_npz(path, "images", "labels")
        if len(arrays) < 2 or len(arrays["images"]) != arrays["labels"].size:
            raise UserError(f"{path} does not hold images and a label of each; sample again")
        yield arrays["images"], arrays["labels"]
