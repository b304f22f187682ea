"""Bytes of host memory on one node, by kind.

States and copies are exact to padding. What processes take besides is an allowance: it was not
measured on a GPU's machine.
"""

from dataclasses import dataclass

from diffmoe.config import BYTES
from diffmoe.planning.layouts import BYTES as ELEMENT
from diffmoe.planning.layouts import Layout
from diffmoe.planning.memory import MASTER, averages, partition

# Python, torch, and what CUDA and NCCL keep on the host's side; and of a reader process.
RANK_BYTES = 4 * 2**30
READER_BYTES = 2**29
# torch rounds pinned memory up to powers of two, by 1.44 on average over evenly spread sizes.
PINNED = 1.5
# Batches of a rank under way: read ahead by the workers, handed over, and in use.
BATCHES = 4 + 2 + 2


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one node. network: of the ranks' weights, which are made there and then moved."""

    processes: int
    network: int
    states: int
    saves: int
    loader: int

    @property
    def total(self) -> int:
        """At the worst moment: the weights have left when the other tensors come."""
        return self.processes + max(self.network, self.states + self.saves + self.loader)


def host_memory(layout: Layout) -> HostMemory:
    """What the ranks of one node need together."""
    config, ranks = layout.config, layout.gpus_per_node
    sizes, own = layout.sizes, partition(layout)
    readers = min(config.data.workers, config.data.lanes // layout.world)
    return HostMemory(
        processes=ranks * (RANK_BYTES + readers * READER_BYTES),
        network=ranks * (sizes.dense + sizes.experts) * MASTER,
        states=ranks * _offloaded(layout),
        saves=int(ranks * own * _saved(layout) * (1 if layout.zero.offload else PINNED)),
        loader=ranks * BATCHES * (config.training.batch_size // layout.world) * _sample(layout),
    )


def _saved(layout: Layout) -> int:
    """Bytes that a save copies of each element: master, moments, averages; of a snapshot, these."""
    training, kept = layout.config.training, averages(layout)
    snapshot = ELEMENT[training.snapshot_precision] if training.snapshot_samples else 0
    return (3 + kept) * MASTER + kept * snapshot


def _offloaded(layout: Layout) -> int:
    """Of one rank: what diffmoe.planning.memory leaves out under offload_optimizer."""
    if not layout.zero.offload:
        return 0
    own, element = partition(layout), layout.element
    # Masters, their gradients, and weights on their way back; the largest gradient on its way.
    pinned = own * (2 * MASTER + element) + layout.sizes.largest * element
    if layout.accumulation > 1:  # gradients of earlier micro-batches
        pinned += own * element
    unpinned = own * (2 + averages(layout)) * MASTER
    return int(pinned * (PINNED if layout.zero.pinned else 1)) + unpinned


def _sample(layout: Layout) -> int:
    """Of one sample as the loop gets it, in fp32."""
    model = layout.config.model
    latent = model.in_channels * model.input_size**2 * 4
    if model.text is None or model.text.encoder == BYTES:
        return latent
    return latent + (model.text.length * model.text.width + model.text.pooled) * 4
