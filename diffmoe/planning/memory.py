"""Bytes on one GPU, by kind."""

from dataclasses import dataclass, fields

from diffmoe.planning.activations import activation_bytes
from diffmoe.planning.layouts import Layout

MASTER = 4  # bytes: masters, moments and averages are fp32
# What CUDA, NCCL and the libraries keep outside of tensors; and what PyTorch's allocator loses.
CONTEXT_BYTES = 2 * 2**30
FRAGMENTATION = 1.06


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU. Gradients: the most that is there at once, partition included."""

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
        """With what no tensor shows."""
        return int(self.tensors * FRAGMENTATION) + CONTEXT_BYTES


def padded(elements: int, ranks: int) -> int:
    """A flat buffer of DeepSpeed's: each rank's partition starts at an even element."""
    step = 2 * ranks
    return -(-elements // step) * step


def partition(layout: Layout) -> int:
    """Elements of all parameter groups whose masters and moments one rank holds."""
    sizes = layout.sizes
    own = padded(sizes.dense, layout.world) // layout.world
    if sizes.experts:
        own += padded(sizes.experts, layout.expert_replicas) // layout.expert_replicas
    return own


def averages(layout: Layout) -> int:
    """Moving averages of the weights that the run keeps."""
    training = layout.config.training
    return len(training.ema_stds) + (training.ema_decay is not None)


def memory(layout: Layout) -> Memory:
    """What one GPU needs at the worst moment of a step."""
    sizes, element, own = layout.sizes, layout.element, partition(layout)
    flat = padded(sizes.dense, layout.world)
    if sizes.experts:
        flat += padded(sizes.experts, layout.expert_replicas)
    # Stage 1 keeps whole gradients until the step. Stage 2 frees what is not its own partition,
    # bucket by bucket. Both copy their partition before the optimizer works on it.
    whole = 0 if layout.config.parallel.zero_stage == 2 else sizes.dense + sizes.experts
    sent = layout.rows * layout.config.model.width * element
    # Offloaded, the optimizer's share is in host memory (host.py); one gradient passes at a time.
    here = 0 if layout.zero.offload else own
    passing = sizes.largest * element if layout.zero.offload else 0
    return Memory(
        parameters=flat * element,
        gradients=whole * element
        + here * (MASTER if element == MASTER else MASTER + element)
        + passing,
        masters=here * MASTER,
        moments=2 * here * MASTER,
        ema=averages(layout) * here * MASTER,
        activations=activation_bytes(layout),
        all_to_all=2 * sent if layout.expert_parallel > 1 else 0,
        buckets=layout.zero.buckets * layout.zero.bucket * element,
    )
