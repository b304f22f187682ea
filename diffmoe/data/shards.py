"""Reading shards: one lane after another of a step, the same for any workers, ranks and resume."""

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.autodecode import Decoder
from webdataset.tariterators import tarfile_samples

from diffmoe.data.lanes import lane_shards, position, sample_order
from diffmoe.data.latents import model_latents
from diffmoe.data.manifest import FILE_NAME, Manifest
from diffmoe.errors import UserError
from diffmoe.seeding import keyed_generator


class Sample(NamedTuple):
    """One decoded sample: `array` is its latent (C,H,W) or its moments (2C,H,W)."""

    key: str
    label: int
    array: np.ndarray
    flip: np.ndarray | None


class Batch(NamedTuple):
    """One rank's samples of one optimizer step, lane by lane."""

    latents: Tensor  # (samples,C,H,W) fp32
    labels: Tensor  # (samples,) int64


def read_shard(path: str | Path, manifest: Manifest) -> list[Sample]:
    """Read a shard whole, in file order, and check every sample against the manifest."""
    names = [f"{manifest.member}.npy"] + [f"{manifest.member}_flip.npy"] * manifest.flips
    decode = Decoder([], only=[*names, "cls"])
    expected = _count_of(path, manifest)
    samples: list[Sample] = []
    # An absolute path, so that gopen cannot take a folder's name for a URL's scheme.
    stream = tarfile_samples(iter([{"url": os.path.abspath(path)}]))
    while True:
        try:
            raw = next(stream, None)
        except Exception as error:  # tarfile raises many kinds on a torn file
            # webdataset appends to the arguments, so str(error) would show a stream's address
            reason = getattr(error, "strerror", None) or (error.args or [""])[0]
            raise UserError(
                f"shard {path} cannot be read after {len(samples)} of {expected} samples "
                f"({type(error).__name__}: {reason}): missing, "
                "truncated or no tar; copy it again or pack the data again"
            ) from error
        if raw is None:
            break
        samples.append(_decoded(path, raw, names, decode, manifest))
    if len(samples) != expected:
        raise UserError(
            f"shard {path} holds {len(samples)} samples, {expected} in {FILE_NAME}; copy it again "
            "or pack the data again"
        )
    return samples


def _count_of(path: str | Path, manifest: Manifest) -> int:
    """The samples that the manifest promises of the shard at `path`."""
    parts = Path(path).parts
    fits = [
        shard
        for shard in manifest.shards
        if parts[-len(Path(shard.name).parts) :] == Path(shard.name).parts
    ]
    if not fits:
        raise UserError(f"shard {path} is not listed in {FILE_NAME}; pack the data again")
    return max(fits, key=lambda shard: len(shard.name)).samples


def _decoded(
    path: str | Path, raw: dict, names: list[str], decode: Decoder, manifest: Manifest
) -> Sample:
    """Decode and check one sample of webdataset: {"__key__": ..., "latent.npy": bytes, ...}."""
    key = raw["__key__"]
    where = f"shard {path}, sample {key}"
    missing = [name for name in [*names, "cls"] if name not in raw]
    if missing:
        there = ", ".join(sorted(name for name in raw if not name.startswith("__")))
        raise UserError(
            f"{where}: {missing[0]} is missing (there is {there}), while {FILE_NAME} says "
            f"content={manifest.content}, flips={manifest.flips}; mend the manifest or pack again"
        )
    try:
        fields = decode(raw)
    except Exception as error:
        raise UserError(
            f"{where}: cannot be decoded ({error.__cause__ or error}); pack the data again"
        ) from error
    arrays = [fields[name] for name in names]
    for name, array in zip(names, arrays, strict=True):
        if array.shape != manifest.array_shape:
            raise UserError(
                f"{where}: {name} has shape {array.shape}, while {FILE_NAME} says "
                f"content={manifest.content}, shape={manifest.shape}, so {manifest.array_shape}; "
                "mend the manifest or pack again"
            )
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise UserError(
                f"{where}: NaN in the data: {name} ({array.dtype}) must hold finite floating-point "
                "numbers only; pack the data again without this sample"
            )
    label = fields["cls"]
    if not 0 <= label < manifest.classes:
        raise UserError(
            f"{where}: label {label} is outside the classes 0..{manifest.classes - 1} of "
            f"{FILE_NAME} (classes={manifest.classes}); mend the manifest or pack again"
        )
    return Sample(key, label, arrays[0], arrays[1] if manifest.flips else None)


class _Lane:
    """One lane's endless stream of samples. Holds one shard in memory at a time."""

    def __init__(self, directory: Path, manifest: Manifest, seed: int, lane: int, lanes: int):
        self.directory, self.manifest = directory, manifest
        self.seed, self.lane, self.lanes = seed, lane, lanes

    def samples(self, offset: int) -> Iterator[Sample]:
        """All samples from the lane's `offset`-th on, forever."""
        shards = self.manifest.shards
        counts = [shard.samples for shard in shards]
        epoch, turn, offset = position(counts, self.seed, self.lane, self.lanes, offset)
        while True:
            for shard in lane_shards(self.seed, epoch, self.lane, self.lanes, len(shards))[turn:]:
                held = read_shard(self.directory / shards[shard].name, self.manifest)
                order = sample_order(self.seed, epoch, shard, len(held))
                yield from (held[index] for index in order[offset:])
                offset = 0
            epoch, turn = epoch + 1, 0


class _Chunks(IterableDataset):
    """Per step, the samples of a worker's contiguous block of lanes; without workers, of all."""

    def __init__(self, stream: "LatentStream"):
        self.stream = stream

    def __iter__(self) -> Iterator[Batch | UserError]:
        worker = get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        mine = self.stream.my_lanes
        block = mine[len(mine) * index // workers : len(mine) * (index + 1) // workers]
        try:
            yield from self.stream.chunks(block)
        except UserError as error:
            # As a value: a raised one would reach the trainer wrapped in the worker's traceback.
            yield UserError(str(error))


class LatentStream:
    """The batches of one rank, from `clock` on, forever.

    Per step the whole run consumes `samples_per_lane` (n) samples of each of `lanes` (V) lanes;
    this rank yields those of `my_lanes`, lane by lane. What a lane gives depends on (seed,
    manifest, V, n, clock) alone: any split of the lanes over ranks and any number of workers give
    the same samples and the same draws, and a stream that starts at clock c equals one that has
    already given c samples, bit for bit.

    workers: processes that read ahead, at most one per lane; 0 reads in this process.
    clock: samples that the whole run has seen; each lane continues at its (clock / V)-th.
    """

    def __init__(
        self,
        directory: str | Path,
        manifest: Manifest,
        *,
        lanes: int,
        my_lanes: Sequence[int],
        samples_per_lane: int,
        seed: int,
        workers: int = 0,
        clock: int = 0,
    ):
        manifest.check_lanes(lanes)
        if not my_lanes or not all(0 <= lane < lanes for lane in my_lanes):
            raise ValueError(f"my_lanes={list(my_lanes)} must be some of 0..{lanes - 1}")
        if samples_per_lane < 1 or workers < 0 or clock < 0:
            raise ValueError(f"{samples_per_lane=}, {workers=}, {clock=} is out of range")
        if clock % lanes:
            raise UserError(
                f"clock {clock} is not a multiple of data.lanes={lanes}; resume with the lanes "
                "that the run began with"
            )
        self.directory, self.manifest = Path(directory), manifest
        self.lanes, self.my_lanes = lanes, list(my_lanes)
        self.samples_per_lane, self.seed, self.clock = samples_per_lane, seed, clock
        self.workers = min(workers, len(self.my_lanes))

    def chunks(self, block: list[int]) -> Iterator[Batch]:
        """The batches of some of the lanes, read in this process."""
        n, clock = self.samples_per_lane, self.clock
        streams = [
            _Lane(self.directory, self.manifest, self.seed, lane, self.lanes).samples(
                clock // self.lanes
            )
            for lane in block
        ]
        while True:
            latents, labels = [], []
            for lane, stream in zip(block, streams, strict=True):
                samples = [next(stream) for _ in range(n)]
                flips = [sample.flip for sample in samples] if self.manifest.flips else None
                generator = keyed_generator(self.seed, "latent", clock, lane)
                arrays = [sample.array for sample in samples]
                latents.append(model_latents(arrays, flips, self.manifest, generator))
                labels += [sample.label for sample in samples]
            yield Batch(torch.cat(latents), torch.tensor(labels))
            clock += self.lanes * n

    def __iter__(self) -> Iterator[Batch]:
        closing = multiprocessing.RawValue("b", 0)
        close = partial(setattr, closing, "value", 1)
        atexit.register(close)  # runs before multiprocessing terminates and joins its children
        loader = DataLoader(
            _Chunks(self),
            batch_size=None,
            num_workers=self.workers,
            collate_fn=_as_is,
            worker_init_fn=partial(_start_worker, closing),
            generator=torch.Generator(),  # else every start would draw from the global one
        )
        chunks = iter(loader)
        try:
            while True:
                # DataLoader takes one chunk of each worker in turn: one round is one step.
                parts = [_checked(next(chunks)) for _ in range(max(1, self.workers))]
                yield Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        finally:
            close()
            del chunks  # ends the workers now, whoever still holds this frame
            atexit.unregister(close)


def _start_worker(closing, index: int) -> None:
    """Leave Ctrl-C and SIGTERM to the trainer: it still needs data to finish its step.

    Launchers signal the whole process group (torchrun, srun), so without this the workers die
    first. A SIGTERM while the stream closes is DataLoader's own and is obeyed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if closing.value else None)
    torch.set_num_threads(1)


def _as_is(chunk: Batch | UserError) -> Batch | UserError:
    return chunk


def _checked(chunk: Batch | UserError) -> Batch:
    if isinstance(chunk, UserError):
        raise chunk
    return chunk
