"""Streams over small shards, whole and damaged."""

from dataclasses import fields

from diffmoe.data.lanes import DataSource
from diffmoe.data.stream import LatentStream

SEED, LANES, N = 3, 2, 2


def open_stream(directory, manifest, my_lanes, samples_per_lane, **options):
    """A LatentStream; the options of its source and its own ones side by side."""
    of_source = {f.name: options.pop(f.name) for f in fields(DataSource) if f.name in options}
    source = DataSource(directory, manifest, **of_source)
    return LatentStream(source, my_lanes, samples_per_lane, **options)


def stream(directory, manifest, reported=None, my_lanes=range(LANES), **options):
    options = {"max_bad_shards": 2, "lanes": LANES, "seed": SEED, **options}
    report = (reported if reported is not None else []).append
    return open_stream(directory, manifest, my_lanes, N, report=report, **options)


def damage(directory, shard, how):
    path = directory / f"{shard:06d}.tar"
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        content[600] ^= 1
        path.write_bytes(content)
