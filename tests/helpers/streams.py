"""Streams over shards of different lengths, which the lanes do not divide."""

from dataclasses import fields
from itertools import islice

import torch
from torch import Tensor

from diffmoe.data.lanes import DataSource
from diffmoe.data.stream import Batch, LatentStream
from diffmoe.tree import tree_map

RAGGED = [5, 7, 3, 6, 4, 8, 5]  # 38 samples; 4 lanes do not divide the 7 shards
LANES, N, SEED = 4, 3, 3
STEPS = 14  # 42 samples a lane: at least its third epoch


def open_stream(directory, manifest, my_lanes, samples_per_lane, **options):
    """A LatentStream; the options of its source and its own ones side by side."""
    of_source = {f.name: options.pop(f.name) for f in fields(DataSource) if f.name in options}
    source = DataSource(directory, manifest, **of_source)
    return LatentStream(source, my_lanes, samples_per_lane, **options)


def batches(directory, manifest, steps=STEPS, lanes=LANES, my_lanes=None, n=N, **options):
    my_lanes = range(lanes) if my_lanes is None else my_lanes
    stream = open_stream(directory, manifest, my_lanes, n, lanes=lanes, seed=SEED, **options)
    return list(islice(stream, steps))


def equal(ours: list[Batch], theirs: list[Batch]) -> bool:
    """Bit for bit, captions included."""
    tensors: tuple[list[Tensor], list[Tensor]] = [], []
    for found, some in zip(tensors, (ours, theirs), strict=True):
        for batch in some:
            tree_map(found.append, batch)
    return len(ours) == len(theirs) and all(
        torch.equal(a, b) for a, b in zip(*tensors, strict=True)
    )
