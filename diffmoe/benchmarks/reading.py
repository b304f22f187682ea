"""How fast the stream of samples is, beside simpler readers of the same shards."""

import io
import tarfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import webdataset

from diffmoe.data.lanes import DataSource
from diffmoe.data.manifest import FeatureContent, Manifest
from diffmoe.data.packing import ShardWriter
from diffmoe.data.stream import LatentStream

LANES = 4


def write_moments(
    directory: Path,
    shards: int,
    samples: int,
    flips: bool,
    shape: tuple[int, int, int] = (4, 32, 32),
    classes: int = 1000,
    features: FeatureContent | None = None,
) -> Manifest:
    """Shards of float16 moments; unless told otherwise like those of ImageNet at 256x256.

    features: to align with, noise as well; without flips.
    """
    writer = ShardWriter(
        directory,
        samples,
        content="mean_logvar",
        scaled=False,
        scale=0.18215,
        shape=shape,
        flips=flips,
        classes=classes,
        autoencoder="none",
        source="benchmark",
        features=features,
    )
    rng = np.random.default_rng(0)
    with writer:
        channels, *size = shape
        for index in range(shards * samples):
            array, *flip = rng.standard_normal((1 + flips, 2 * channels, *size)).astype(np.float16)
            encoded = rng.standard_normal(features.shape).astype(np.float16) if features else None
            own = () if encoded is None else (encoded,)
            writer.add(
                f"{index:08d}", index % classes, array, flip[0] if flips else None, features=own
            )
    return writer.manifest


def bare_loop(directory: Path, manifest: Manifest) -> Iterator[int]:
    """tarfile and np.load over every member, nothing else. Yields the number of samples read."""
    for shard in manifest.shards:
        with tarfile.open(directory / shard.name) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None  # shards hold files alone
                content = file.read()
                if member.name.endswith("npy"):
                    np.load(io.BytesIO(content))
                else:
                    int(content)
                    yield 1


def webdataset_loop(directory: Path, manifest: Manifest) -> Iterator[int]:
    """webdataset's own pipeline and decoder."""
    urls = [str(directory / shard.name) for shard in manifest.shards]
    for _ in webdataset.WebDataset(urls, shardshuffle=False).decode():
        yield 1


def stream_loop(directory: Path, manifest: Manifest, workers: int, n: int = 64) -> Iterator[int]:
    """The project's stream: checked, shuffled, drawn from the posterior, scaled, batched."""
    for batch in stream(directory, manifest, workers, n):
        yield len(batch.labels)


def stream(directory: Path, manifest: Manifest, workers: int, n: int) -> LatentStream:
    source = DataSource(directory, manifest, lanes=LANES, seed=0)
    return LatentStream(source, range(LANES), n, workers=workers)


def samples_per_second(loop: Callable[[], Iterator[int]], samples: int) -> float:
    """After a warm-up of a tenth: processes are started, files are open."""
    counts = loop()
    warm = 0
    while warm < samples // 10:
        warm += next(counts)
    start, seen = time.perf_counter(), 0
    for count in counts:
        seen += count
        if seen >= samples:
            break
    return seen / (time.perf_counter() - start)


def reading_speeds(
    directory: Path, manifest: Manifest, workers: list[int], rounds: int
) -> dict[str, float]:
    """Samples per second of each reader, the best of `rounds` that take turns."""
    samples = manifest.samples * 4 // 5
    loops: dict[str, Callable[[], Iterator[int]]] = {
        "bare loop": lambda: bare_loop(directory, manifest),
        "webdataset": lambda: webdataset_loop(directory, manifest),
    }
    for count in workers:
        loops[f"{count} workers"] = partial(stream_loop, directory, manifest, count)
    best = dict.fromkeys(loops, 0.0)
    for _ in range(rounds):
        for name, loop in loops.items():
            best[name] = max(best[name], samples_per_second(loop, samples))
    return best


def waiting_share(
    directory: Path, manifest: Manifest, rate: float, workers: int, steps: int = 100
) -> float:
    """Share of the time that a loop waits for data, if its computing is a sleep.

    rate: samples per second that the loop would do, did it never wait.
    """
    n = 64
    batches = islice(stream(directory, manifest, workers, n), steps + 10)
    waited, start = 0.0, time.perf_counter()
    for step in range(steps + 10):
        asked = time.perf_counter()
        batch = next(batches)
        torch.from_numpy(batch.latents.numpy())  # what a loop touches
        now = time.perf_counter()
        if step == 10:
            waited, start = 0.0, now
        elif step > 10:
            waited += now - asked
        time.sleep(LANES * n / rate)
    return waited / (time.perf_counter() - start)
