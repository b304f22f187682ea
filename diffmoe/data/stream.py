"""The stream of samples: one lane after another of a step, the same for any workers and ranks."""

import atexit
import math
import multiprocessing
import pickle
import signal
import sys
import threading
from collections import ChainMap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from diffmoe.conditions import Text
from diffmoe.config import BYTES
from diffmoe.data import shared_memory
from diffmoe.data.collate import chosen, padded
from diffmoe.data.fetching import Fetch, end_commands
from diffmoe.data.lane import Lane
from diffmoe.data.latents import NotFinite, draw_mirrored, model_latents
from diffmoe.data.manifest import Manifest
from diffmoe.data.prefetch import READY, prefetched
from diffmoe.data.reading import unreadable
from diffmoe.errors import UserError
from diffmoe.process.exit import end_process
from diffmoe.seeding import keyed_generator
from diffmoe.tree import tree_cat

_AHEAD = 4  # batches that each worker keeps ready: enough to bridge the opening of a shard


class Batch(NamedTuple):
    """One rank's samples of one optimizer step, lane by lane."""

    latents: Tensor  # (samples,C,H,W) fp32
    labels: Tensor  # (samples,) int64
    text: Text | None = None  # a caption of each, where the stream gives them


class Chunk(NamedTuple):
    """A worker's part of a batch."""

    batch: Batch
    bad_shards: dict[str, str]  # address to reason, of all that it has met so far


class _Chunks(IterableDataset):
    """Per step, the samples of a worker's contiguous block of lanes; without workers, of all.

    by_value: as pickles, which go through a pipe instead of shared memory.
    """

    def __init__(self, stream: "LatentStream", by_value: bool):
        self.stream, self.by_value = stream, by_value

    def __iter__(self) -> Iterator[Chunk | UserError | bytes]:
        # torch shares the tensors of what it pickles for a worker's queue; pickle copies them.
        return map(pickle.dumps, self._chunks()) if self.by_value else self._chunks()

    def _chunks(self) -> Iterator[Chunk | UserError]:
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
    captions: give one of each sample's captions, drawn for the sample, of manifest.text.
    max_bad_shards: how many different shards may be unreadable before the stream stops.
    report: told of every shard that is replaced; by default standard error is.

    bad_shards: address and reason of those that were replaced so far.
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
        captions: bool = False,
        max_bad_shards: int = 0,
        fetch: Fetch = Fetch(),  # noqa: B008 (a tuple)
        report: Callable[[str], None] | None = None,
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
        self.captions = captions
        self.max_bad_shards, self.fetch, self.report = max_bad_shards, fetch, report or _tell
        self.bad_shards: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are not forked: a report may hold files, and they tell nothing."""
        return self.__dict__ | {"report": None}

    def chunks(self, block: list[int]) -> Iterator[Chunk]:
        """The batches of some of the lanes, read in this process."""
        n, clock, bad_shards = self.samples_per_lane, self.clock, {}
        content = self.manifest.text
        streams = [Lane(self, lane, bad_shards).spots(clock // self.lanes) for lane in block]
        while True:
            latents, labels, captions = [], [], []
            for lane, stream in zip(block, streams, strict=True):
                generator = keyed_generator(self.seed, "latent", clock, lane)
                mirrored = draw_mirrored(n, self.manifest, generator)
                which = torch.rand(n, generator=keyed_generator(self.seed, "caption", clock, lane))
                arrays, spots = [], []
                for flip, draw, spot in zip(mirrored, which.tolist(), stream, strict=False):
                    arrays.append(spot.shard.array(spot.index, flip))
                    labels.append(spot.shard.labels[spot.index])
                    if self.captions:  # now, since a shard's last sample closes it
                        captions.append(chosen(spot.shard.captions(spot.index), draw, content))
                    spots.append(spot)
                try:
                    latents.append(model_latents(arrays, self.manifest, generator))
                except NotFinite as error:
                    shard, index = spots[error.index]
                    raise shard.not_finite(index) from None
            text = padded(captions, content) if self.captions else None
            batch = Batch(torch.cat(latents), torch.tensor(labels), text)
            yield Chunk(batch, dict(bad_shards))
            clock += self.lanes * n

    def __iter__(self) -> Iterator[Batch]:
        closing = multiprocessing.RawValue("b", 0)
        close = partial(setattr, closing, "value", 1)
        atexit.register(close)  # runs before multiprocessing terminates and joins its children
        by_value = self.workers > 0 and not self._shared_memory_holds()
        loader = DataLoader(
            _Chunks(self, by_value),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=_AHEAD if self.workers else None,
            collate_fn=_as_is,
            worker_init_fn=partial(_start_worker, closing),
            generator=torch.Generator(),  # else every start would draw from the global one
        )
        chunks = map(pickle.loads, loader) if by_value else iter(loader)
        steps = _steps(chunks, max(1, self.workers))
        if self.workers:
            # Taking over what workers send costs time, too: a loop need not wait for it.
            steps = prefetched(steps)
        try:
            for step in steps:
                yield self._received(step)
        finally:
            close()
            steps.close()
            del chunks, steps  # ends the workers now, whoever still holds this frame
            atexit.unregister(close)

    def bad_flags(self) -> Tensor:
        """1 for each of the manifest's shards that was replaced so far, else 0: (shards,) int32."""
        addresses = (self.manifest.address(self.directory, s) for s in self.manifest.shards)
        return torch.tensor([a in self.bad_shards for a in addresses], dtype=torch.int32)

    def too_many(self, address: str, reason: str) -> UserError:
        """Why the stream stops: this shard is one too many."""
        way_out = f"or set data.max_bad_shards (now {self.max_bad_shards}) to go on without it"
        return UserError(f"{unreadable(address, reason)}, {way_out}")

    def batch_bytes(self) -> int:
        """What one batch takes in memory."""
        latent = 4 * math.prod(self.manifest.shape)
        text = self.manifest.text if self.captions else None
        if text is not None:
            # Bytes become int64, features are float16; each place has a mask.
            token = 8 if text.encoder == BYTES else 2 * text.width
            latent += text.length * (token + 1) + 2 * text.pooled
        return len(self.my_lanes) * self.samples_per_lane * (latent + 8)

    def _shared_memory_holds(self) -> bool:
        """Whether it holds all batches that wait at a time; says so if it does not."""
        # Those that workers have made, those that are made ready, and one being made and used.
        size = self.batch_bytes() * (_AHEAD + READY + 2)
        if shared_memory.holds(size):
            return True
        self.report(
            f"{shared_memory.PLACE} has {shared_memory.free() / 1e6:.0f} MB free, and batches in "
            f"it would take {size / 1e6:.0f} MB for each rank: they go through pipes, which costs "
            "a copy of each (give a container more, docker run --shm-size=8g)"
        )
        return False

    def _received(self, chunk: Chunk | UserError) -> Batch:
        if isinstance(chunk, UserError):
            raise chunk
        for address, reason in chunk.bad_shards.items():
            if address in self.bad_shards:
                continue
            self.bad_shards[address] = reason
            if len(self.bad_shards) > self.max_bad_shards:
                raise self.too_many(address, reason)
            self.report(
                f"shard {address} cannot be read ({reason}): its lane's next one stands in for it; "
                f"{len(self.bad_shards)} of data.max_bad_shards={self.max_bad_shards}"
            )
        return chunk.batch


def _steps(chunks: Iterator[Chunk | UserError], parts: int) -> Iterator[Chunk | UserError]:
    """The chunks of all workers, step by step: DataLoader takes one of each in turn."""
    while True:
        step = list(islice(chunks, parts))
        errors = [chunk for chunk in step if isinstance(chunk, UserError)]
        if errors:
            yield errors[0]
            return
        batches, bad_shards = zip(*step, strict=True)
        yield Chunk(tree_cat(batches), dict(ChainMap(*bad_shards)))


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _start_worker(closing, index: int) -> None:
    """Leave signals to the trainer: it still needs data to finish its step; end when it has gone.

    Launchers signal the whole process group (torchrun, srun), so without this the workers die
    first. A SIGTERM while the stream closes is DataLoader's own and is obeyed.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: end_process(0) if closing.value else None)
    # DataLoader's own look at the trainer waits until a batch is taken, which nobody does then.
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    Finalize(None, end_commands, exitpriority=0)  # atexit is not for processes like this
    torch.set_num_threads(1)


def _end_with(trainer: BaseProcess) -> None:
    trainer.join()
    end_process(0)


def _as_is(chunk: Chunk | UserError | bytes) -> Chunk | UserError | bytes:
    return chunk
