"""The stream of training batches: step by step, the same for any number of ranks and workers."""

import math
import sys
from collections import ChainMap
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffmoe.conditions import Text
from diffmoe.config import BYTES
from diffmoe.data.captions import choose_caption, pad_captions
from diffmoe.data.lanes import DataSource, Lane
from diffmoe.data.latents import NotFinite, draw_mirrored, model_latents
from diffmoe.data.prefetch import prefetched
from diffmoe.data.workers import items_from_workers
from diffmoe.errors import UserError
from diffmoe.seeding import keyed_generator
from diffmoe.tree import tree_cat


class Batch(NamedTuple):
    """One rank's samples of one optimizer step, lane by lane."""

    latents: Tensor  # (samples,C,H,W) fp32
    labels: Tensor  # (samples,) int64
    text: Text | None = None  # one caption of each sample, if the stream yields captions
    features: Tensor | None = None  # (samples,Z,h,w) fp16, if the source has them


class Chunk(NamedTuple):
    """A worker's part of a batch, or what was made of a whole one."""

    batch: Any
    bad_shards: dict[str, str]  # address to reason, of all found so far


class LatentStream:
    """The batches of one rank, from `clock` on, forever.

    Per step the whole run consumes `samples_per_lane` (n) samples of each of the source's V lanes;
    this rank yields those of `my_lanes`, lane by lane. What a lane yields depends only on the
    source (seed, manifest, V), n and clock: any split of the lanes over ranks and any number of
    workers give the same samples and the same draws, and a stream that starts at clock c equals,
    bit for bit, one that has already yielded c samples.

    clock: samples that the whole run has seen; each lane continues at its (clock / V)-th.
    captions: also yield one caption of each sample, drawn at random.
    workers: processes that read ahead, at most one per lane; 0 reads in this process.
    prepare: makes what is yielded of each batch and its clock, ahead, in a thread; None yields the
        batches.
    report: receives a message for every shard that is replaced; None prints them to stderr.

    bad_shards: address and reason of each shard replaced so far.
    """

    def __init__(
        self,
        source: DataSource,
        my_lanes: Sequence[int],
        samples_per_lane: int,
        *,
        clock: int = 0,
        captions: bool = False,
        workers: int = 0,
        prepare: Callable[[Batch, int], Any] | None = None,
        report: Callable[[str], None] | None = None,
    ):
        lanes = source.lanes
        if not my_lanes or not all(0 <= lane < lanes for lane in my_lanes):
            raise ValueError(f"my_lanes={list(my_lanes)} must be some of 0..{lanes - 1}")
        if samples_per_lane < 1 or workers < 0 or clock < 0:
            raise ValueError(f"{samples_per_lane=}, {workers=}, {clock=} is out of range")
        if clock % lanes:
            raise UserError(
                f"clock {clock} is not a multiple of data.lanes={lanes}; resume with the "
                "data.lanes that the run began with"
            )
        if captions and source.manifest.text is None:
            raise ValueError("captions=True, but the manifest has no text")
        self.source, self.my_lanes, self.samples_per_lane = source, list(my_lanes), samples_per_lane
        self.clock, self.captions = clock, captions
        self.workers = min(workers, len(self.my_lanes))
        self.prepare, self.report = prepare, report or _print
        self.bad_shards: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are not forked. They do not report, and a report may hold files."""
        return self.__dict__ | {"report": None, "prepare": None}

    def __iter__(self) -> Iterator[Any]:
        if self.workers:
            chunks = items_from_workers(
                self.worker_chunks, self.workers, self.batch_bytes(), self.report
            )
            steps = _steps(chunks, self.workers)
        else:
            steps = _steps(self.worker_chunks(0, 1), 1)
        if self.prepare is not None:
            steps = self._prepared(steps, self.prepare)
        if self.workers or self.prepare is not None:
            # Receiving what workers send takes time, too; the training loop need not wait for it.
            steps = prefetched(steps)
        try:
            for step in steps:
                yield self._received(step)
        finally:
            steps.close()

    def worker_chunks(self, index: int, workers: int) -> Generator[Chunk | UserError, None, None]:
        """Per step, the samples of one worker's contiguous block of this rank's lanes.

        An error is yielded as a value: raised, it would arrive wrapped in the worker's traceback.
        """
        n = len(self.my_lanes)
        block = self.my_lanes[n * index // workers : n * (index + 1) // workers]
        try:
            yield from self.chunks(block)
        except UserError as error:
            yield UserError(str(error))

    def chunks(self, block: list[int]) -> Iterator[Chunk]:
        """The batches of some of the lanes, read in this process."""
        source, manifest, content = self.source, self.source.manifest, self.source.manifest.text
        n, clock = self.samples_per_lane, self.clock
        bad_shards: dict[str, str] = {}
        lanes = [Lane(source, lane, bad_shards).samples(clock // source.lanes) for lane in block]
        while True:
            latents, labels, captions = [], [], []
            features: list[np.ndarray] = []
            for lane, samples in zip(block, lanes, strict=True):
                generator = keyed_generator(source.seed, "latent", clock, lane)
                mirrored = draw_mirrored(n, manifest, generator)
                which = torch.rand(
                    n, generator=keyed_generator(source.seed, "caption", clock, lane)
                )
                arrays, refs = [], []
                for flip, draw, ref in zip(mirrored, which.tolist(), samples, strict=False):
                    arrays.append(ref.shard.array(ref.number, flip))
                    labels.append(ref.shard.labels[ref.number])
                    if self.captions and content is not None:
                        # Now, because after its last sample a shard is closed.
                        found = ref.shard.captions(ref.number)
                        captions.append(choose_caption(found, draw, content))
                    if clock < source.features_until:
                        features.append(ref.shard.features(ref.number, flip))
                    refs.append(ref)
                try:
                    latents.append(model_latents(arrays, manifest, generator))
                except NotFinite as error:
                    shard, number = refs[error.index]
                    raise shard.not_finite(number) from None
            text = None if content is None or not captions else pad_captions(captions, content)
            aligned = torch.from_numpy(np.stack(features)) if features else None
            batch = Batch(torch.cat(latents), torch.tensor(labels), text, aligned)
            yield Chunk(batch, dict(bad_shards))
            clock += source.lanes * n

    def bad_flags(self) -> Tensor:
        """1 for each of the manifest's shards that was replaced so far, else 0: (shards,) int32."""
        source = self.source
        addresses = map(source.address, range(len(source.manifest.shards)))
        return torch.tensor([a in self.bad_shards for a in addresses], dtype=torch.int32)

    def batch_bytes(self) -> int:
        """Memory that one batch takes."""
        manifest = self.source.manifest
        sample = 4 * math.prod(manifest.shape)
        text = manifest.text if self.captions else None
        if text is not None:
            # Bytes become int64, features are float16; the mask takes a byte per token.
            token = 8 if text.encoder == BYTES else 2 * text.width
            sample += text.length * (token + 1) + 2 * text.pooled
        if self.clock < self.source.features_until and manifest.features is not None:
            sample += 2 * math.prod(manifest.features.shape)
        return len(self.my_lanes) * self.samples_per_lane * (sample + 8)

    def _prepared(
        self,
        steps: Generator[Chunk | UserError, None, None],
        prepare: Callable[[Batch, int], Any],
    ) -> Generator[Chunk | UserError, None, None]:
        clock = self.clock
        try:
            for step in steps:
                if isinstance(step, Chunk):
                    step = step._replace(batch=prepare(step.batch, clock))
                yield step
                clock += self.source.lanes * self.samples_per_lane
        finally:
            steps.close()

    def _received(self, chunk: Chunk | UserError) -> Any:
        """The batch of a chunk, after its new bad shards were reported. Raises its error."""
        if isinstance(chunk, UserError):
            raise chunk
        limit = self.source.max_bad_shards
        for address, reason in chunk.bad_shards.items():
            if address in self.bad_shards:
                continue
            self.bad_shards[address] = reason
            if len(self.bad_shards) > limit:
                raise self.source.too_many_bad_shards(address, reason)
            self.report(
                f"shard {address} cannot be read ({reason}): the next shard of its lane replaces "
                f"it; {len(self.bad_shards)} of data.max_bad_shards={limit}"
            )
        return chunk.batch


def _steps(
    chunks: Generator[Chunk | UserError, None, None], parts: int
) -> Generator[Chunk | UserError, None, None]:
    """Join the workers' chunks of each step; they come one of each worker in turn."""
    try:
        while True:
            step = list(islice(chunks, parts))
            good = [chunk for chunk in step if isinstance(chunk, Chunk)]
            if len(good) < len(step):
                yield next(chunk for chunk in step if isinstance(chunk, UserError))
                return
            batches, bad_shards = zip(*good, strict=True)
            yield Chunk(tree_cat(batches), dict(ChainMap(*bad_shards)))
    finally:
        chunks.close()


def _print(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
