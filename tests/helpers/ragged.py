"""Streams over shards of different lengths, which the lanes do not divide."""

from itertools import islice

import torch

from diffmoe.data.stream import Batch
from tests.helpers.streams import open_stream

RAGGED = [5, 7, 3, 6, 4, 8, 5]  # 38 samples; 4 lanes do not divide the 7 shards


LANES, N = 4, 3
STEPS = 14  # 42 samples a lane: at least its third epoch


def batches(directory, manifest, steps=STEPS, lanes=LANES, my_lanes=None, n=N, **options):
    my_lanes = range(lanes) if my_lanes is None else my_lanes
    stream = open_stream(directory, manifest, my_lanes, n, lanes=lanes, seed=3, **options)
    return list(islice(stream, steps))


def equal(ours: list[Batch], theirs: list[Batch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a.latents, b.latents) and torch.equal(a.labels, b.labels)
        for a, b in zip(ours, theirs, strict=True)
    )
