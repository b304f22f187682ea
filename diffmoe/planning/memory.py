"""Bytes of memory on one GPU, by kind."""

from dataclasses import dataclass, fields

from diffmoe.parallel.orthogonalize import Matrices
from diffmoe.planning.activations import activation_bytes
from diffmoe.planning.layouts import Layout

MASTER = 4  # bytes: masters, moments and averages are fp32
# What CUDA, NCCL and libraries need outside of tensors; what PyTorch's allocator loses.
CONTEXT_BYTES = 2 * 2**30
FRAGMENTATION = 1.06


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU. gradients: at their peak, including the copy of this rank's partition."""

    parameters: int
    gradients: int
    masters: int
    moments: int
    ema: int
    activations: int
    all_to_all: int
    buckets: int

    @property
    def tensors(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def total(self) -> int:
        """Of the process, with what is not in tensors."""
        return int(self.tensors * FRAGMENTATION) + CONTEXT_BYTES


def padded(elements: int, ranks: int) -> int:
    """Elements of a DeepSpeed flat buffer: each rank's partition starts at an even element."""
    step = 2 * ranks
    return -(-elements // step) * step


@dataclass(frozen=True)
class Group:
    """Parameters that DeepSpeed flattens together: of one type, shared out to the same ranks.

    matrices: those that Muon orthogonalizes, which make up the whole group; none: AdamW's.
    """

    elements: int
    ranks: int
    element: int
    matrices: tuple[Matrices, ...] = ()

    @property
    def flat(self) -> int:
        """Elements with padding."""
        return padded(self.elements, self.ranks)

    @property
    def own(self) -> int:
        """Elements of one rank's partition."""
        return self.flat // self.ranks

    @property
    def moments(self) -> int:
        """Numbers of optimizer state per element."""
        return 1 if self.matrices else 2


def dense_groups(layout: Layout) -> list[Group]:
    return [
        Group(one.elements, layout.world, MASTER if one.routing else layout.element, one.matrices)
        for one in layout.sizes.groups
        if not one.experts
    ]


def expert_groups(layout: Layout) -> list[Group]:
    return [
        Group(one.elements, layout.expert_replicas, layout.element, one.matrices)
        for one in layout.sizes.groups
        if one.experts
    ]


def parameter_groups(layout: Layout) -> list[Group]:
    return dense_groups(layout) + expert_groups(layout)


def partition_size(layout: Layout) -> int:
    """Elements whose masters and moments one rank holds, over all parameter groups."""
    return sum(group.own for group in parameter_groups(layout))


def moment_bytes(layout: Layout) -> int:
    """Of one rank: AdamW's two moments, or Muon's momentum."""
    return sum(group.own * group.moments for group in parameter_groups(layout)) * MASTER


def average_count(layout: Layout) -> int:
    """How many moving averages of the weights the run tracks."""
    training = layout.config.training
    return len(training.ema_stds) + (training.ema_decay is not None)


def memory(layout: Layout) -> Memory:
    """What one GPU needs at the peak of a step."""
    sizes, element, own = layout.sizes, layout.element, partition_size(layout)
    groups = parameter_groups(layout)
    # Stage 1 keeps all gradients until the step. Stage 2 frees those of other ranks' partitions,
    # bucket by bucket. Both copy their own partition for the optimizer.
    stage_2 = layout.config.parallel.zero_stage == 2
    accumulated = layout.zero.accumulated
    kept = sum(group.elements * max(accumulated, group.element) for group in groups)
    sent = layout.rows * layout.config.model.width * element
    # With offload the optimizer's share is in host memory (host.py); gradients leave one by one,
    # unless they are summed in fp32 first.
    here = 0 if layout.zero.offload else own
    passing = sizes.largest * element if layout.zero.offload else 0
    if layout.zero.offload and accumulated != element:
        passing += own * accumulated
    frozen = (sizes.frozen - sizes.frozen_routing) * element + sizes.frozen_routing * MASTER
    # Of fp32 parameters they are those themselves.
    frozen_masters = 0 if element == MASTER else layout.frozen_copies
    return Memory(
        parameters=sum(group.flat * group.element for group in groups) + frozen,
        gradients=(0 if stage_2 else kept)
        + here * (MASTER if accumulated == MASTER else MASTER + accumulated)
        + passing,
        masters=(here + frozen_masters) * MASTER,
        moments=0 if layout.zero.offload else moment_bytes(layout),
        ema=average_count(layout) * here * MASTER,
        activations=activation_bytes(layout),
        all_to_all=2 * sent if layout.expert_parallel > 1 else 0,
        # Stage 1 reduces sums of micro-batches, stage 2 each as it comes from the backward.
        buckets=layout.zero.buckets * layout.zero.bucket * (element if stage_2 else accumulated),
    )
