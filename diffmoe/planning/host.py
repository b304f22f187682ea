"""Bytes of host memory on one node, by kind.

Optimizer states and copies for saving are exact up to padding. What the processes themselves need
is an allowance that was not measured on a machine with GPUs.
"""

import math
from dataclasses import dataclass

from diffmoe.config import BYTES
from diffmoe.planning.layouts import BYTES as ELEMENT
from diffmoe.planning.layouts import Layout
from diffmoe.planning.memory import (
    MASTER,
    average_count,
    moment_bytes,
    parameter_groups,
    partition_size,
)

# Of a rank: Python, torch, and the host side of CUDA and NCCL. Of a data worker.
RANK_BYTES = 4 * 2**30
READER_BYTES = 2**29
# torch rounds pinned memory up to a power of two: on average 1.44 times the size.
PINNED = 1.5
# Batches per rank: prefetched by the workers; and, of data, noise and their mixture each, those
# that are ready, the next one, and the one in use.
BATCHES = 4 + 3 * (2 + 1 + 1)
FEATURES = 4 + (2 + 1 + 1)  # the same of an aligned run's features, which are not noised


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one node.

    network: the ranks' weights, created on the host and then moved to the GPUs. states: offloaded
    optimizer states. saves: copies for saving checkpoints. loader: batches, with the features of an
    aligned run.
    """

    processes: int
    network: int
    states: int
    saves: int
    loader: int

    @property
    def total(self) -> int:
        """At the peak. The weights are on the GPUs before the other tensors are allocated."""
        return self.processes + max(self.network, self.states + self.saves + self.loader)


def host_memory(layout: Layout) -> HostMemory:
    """Host memory of all ranks of one node."""
    config, ranks = layout.config, layout.gpus_per_node
    sizes = layout.sizes
    readers = min(config.data.workers, config.data.lanes // layout.world)
    return HostMemory(
        processes=ranks * (RANK_BYTES + readers * READER_BYTES),
        network=ranks * (sizes.dense + sizes.experts + sizes.frozen) * MASTER,
        states=ranks * _offloaded(layout),
        saves=int(ranks * _saved(layout) * (1 if layout.zero.offload else PINNED)),
        loader=ranks
        * (config.training.batch_size // layout.world)
        * (BATCHES * _sample(layout) + FEATURES * layout.features_per_sample),
    )


def _saved(layout: Layout) -> int:
    """Bytes of a rank that saves copy: masters, moments and averages; of snapshots, averages."""
    training, kept = layout.config.training, average_count(layout)
    snapshot = ELEMENT[training.snapshot_precision] if training.snapshot_samples else 0
    each = (1 + kept) * MASTER + kept * snapshot
    return (partition_size(layout) + layout.frozen_share) * each + moment_bytes(layout)


def _offloaded(layout: Layout) -> int:
    """Of one rank: what memory.py leaves out if the optimizer is offloaded."""
    if not layout.zero.offload:
        return 0
    own, element = partition_size(layout), layout.element
    # Masters, their gradients, and a buffer for returning weights; the largest gradient in transit.
    returning = sum(group.own * group.element for group in parameter_groups(layout))
    pinned = own * 2 * MASTER + returning + layout.sizes.largest * element
    # Gradients of earlier micro-batches: stage 1's, and sums in fp32, stay on the GPU (memory.py).
    stage_2 = layout.config.parallel.zero_stage == 2
    if layout.accumulation > 1 and stage_2 and layout.zero.accumulated == element:
        pinned += returning
    unpinned = own * average_count(layout) * MASTER + moment_bytes(layout)
    return int(pinned * (PINNED if layout.zero.pinned else 1)) + unpinned


def _sample(layout: Layout) -> int:
    """Of one sample as the loop receives it, in fp32."""
    model = layout.config.model
    latent = math.prod(model.latent_shape) * 4
    if model.text is None or model.text.encoder == BYTES:
        return latent
    return latent + (model.text.length * model.text.width + model.text.pooled) * 4
