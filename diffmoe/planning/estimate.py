"""A rough estimate of a step's time, and which layout to choose."""

from collections.abc import Iterable
from dataclasses import dataclass

from diffmoe.errors import UserError
from diffmoe.planning.activations import activation_bytes
from diffmoe.planning.flops import newton_schulz_flops, step_flops
from diffmoe.planning.host import HostMemory, host_memory
from diffmoe.planning.layouts import Layout
from diffmoe.planning.machine import Machine
from diffmoe.planning.memory import (
    MASTER,
    Memory,
    average_count,
    memory,
    moment_bytes,
    partition_size,
)
from diffmoe.planning.traffic import Collective, traffic


@dataclass(frozen=True)
class Plan:
    """What a layout needs on a machine.

    flops: of one GPU in one optimizer step. seconds: of one optimizer step. fits_gpu, fits_node:
    whether the memory of a GPU, and the host memory of a node, suffices.
    """

    layout: Layout
    memory: Memory
    host: HostMemory
    traffic: list[Collective]
    flops: int
    seconds: float
    fits_gpu: bool
    fits_node: bool

    @property
    def fits(self) -> bool:
        return self.fits_gpu and self.fits_node


def plan(layout: Layout, machine: Machine) -> Plan:
    """Estimate memory, traffic, FLOPs and time. Nothing is assumed to overlap."""
    needed, moved = memory(layout), traffic(layout)
    flops = step_flops(layout) + newton_schulz_flops(layout)
    host = host_memory(layout)
    rate = machine.flops_bf16 if layout.element == 2 else machine.flops_fp32
    seconds = flops / rate
    seconds += sum(c.within / machine.within + c.between / machine.between for c in moved)
    # Activations are written once and read twice, their gradients written and read once. The
    # optimizer reads and writes masters, moments and averages, and reads gradients.
    recomputed = layout.config.training.activation_checkpointing
    kept = activation_bytes(layout.changed({"training.activation_checkpointing": False}))
    seconds += (5 + 2 * recomputed) * kept * layout.accumulation / machine.device
    own = partition_size(layout)
    states = own * (1 + average_count(layout)) * MASTER + moment_bytes(layout)
    seconds += (2 * states + own * 4 * MASTER) / (
        machine.host if layout.zero.offload else machine.device
    )
    if layout.zero.offload:  # gradients to the host, weights back
        seconds += 2 * own * layout.element / machine.host
    return Plan(
        layout,
        needed,
        host,
        moved,
        flops,
        seconds,
        fits_gpu=needed.total <= machine.memory,
        fits_node=host.total <= machine.node_memory,
    )


def recommend(plans: Iterable[Plan]) -> Plan:
    """The fastest plan that fits; within 2 %, the largest micro-batch, then the least memory.

    A larger micro-batch makes a larger pool of tokens, and more work per kernel launch. Raises
    UserError if none fits, with the one that comes closest.
    """
    plans = list(plans)
    fitting = [one for one in plans if one.fits]
    if not fitting:
        on_gpu = [one for one in plans if one.fits_gpu]
        if on_gpu:
            least = min(on_gpu, key=lambda one: one.host.total)
            raise UserError(
                f"no layout fits: of those that fit the GPUs, {least.layout.describe()} needs the "
                f"least host memory, {least.host.total / 1e9:.1f} GB per node; use nodes with more "
                "memory, more nodes, or a DeepSpeed JSON without offload"
            )
        least = min(plans, key=lambda one: one.memory.total)
        raise UserError(
            f"no layout fits: the smallest, {least.layout.describe()}, needs "
            f"{least.memory.total / 1e9:.1f} GB per GPU; use more GPUs, or training.precision=bf16"
        )
    best = min(one.seconds for one in fitting)
    return min(
        (one for one in fitting if one.seconds <= 1.02 * best),
        key=lambda one: (-one.layout.micro_batch, one.memory.total),
    )
