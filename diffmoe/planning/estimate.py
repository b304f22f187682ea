"""How long a step takes, roughly, and which layout to take."""

from collections.abc import Iterable
from dataclasses import dataclass

from diffmoe.errors import UserError
from diffmoe.planning.activations import activation_bytes
from diffmoe.planning.flops import step_flops
from diffmoe.planning.layouts import Layout
from diffmoe.planning.memory import Memory, memory, partition
from diffmoe.planning.traffic import Collective, traffic


@dataclass(frozen=True)
class Machine:
    """One GPU and its links. The defaults are an H100 with NVLink, and 400 Gbit/s of network a GPU.

    memory: bytes. flops_*: what products reach, operations a second: 40 % of the card's sheet.
    within, between, device: bytes a second that reach a GPU from its node's others, from other
    nodes, and from its own memory.
    """

    memory: float = 80e9
    flops_bf16: float = 0.4 * 989e12
    flops_fp32: float = 0.4 * 495e12
    within: float = 300e9
    between: float = 40e9
    device: float = 2.5e12

    def assumptions(self) -> str:
        return (
            f"assumed: products reach {self.flops_bf16 / 1e12:.0f} TFLOP/s in bf16 and "
            f"{self.flops_fp32 / 1e12:.0f} in fp32 (TF32); a GPU gets {self.within / 1e9:.0f} GB/s "
            f"inside its node and {self.between / 1e9:.0f} between nodes, {self.device / 1e12:g} "
            "TB/s from its own memory; nothing overlaps; no time for kernel launches and data"
        )


@dataclass(frozen=True)
class Plan:
    """seconds: of one optimizer step; fits: on the machine's GPUs."""

    layout: Layout
    memory: Memory
    traffic: list[Collective]
    flops: int
    seconds: float
    fits: bool


def plan(layout: Layout, machine: Machine) -> Plan:
    needed, moved, flops = memory(layout), traffic(layout), step_flops(layout)
    rate = machine.flops_bf16 if layout.element == 2 else machine.flops_fp32
    seconds = flops / rate
    seconds += sum(c.within / machine.within + c.between / machine.between for c in moved)
    # What is kept for the backward is written once and read twice, its gradient written and read.
    # The optimizer reads and writes masters, moments and averages, and reads gradients.
    again = layout.config.training.activation_checkpointing
    kept = activation_bytes(layout.changed({"training.activation_checkpointing": False}))
    seconds += (5 + 2 * again) * kept * layout.accumulation / machine.device
    seconds += 2 * (needed.masters + needed.moments + needed.ema) / machine.device
    seconds += 4 * partition(layout) * 4 / machine.device
    return Plan(layout, needed, moved, flops, seconds, needed.total <= machine.memory)


def recommended(plans: Iterable[Plan]) -> Plan:
    """The quickest that fits; among equals (2 %) the largest micro-batch, then least memory.

    A larger micro-batch is a larger pool of tokens, and more work for each launch of a kernel.
    """
    plans = list(plans)
    fitting = [one for one in plans if one.fits]
    if not fitting:
        least = min(plans, key=lambda one: one.memory.total)
        raise UserError(
            f"no layout fits: the smallest, {least.layout.describe()}, needs "
            f"{least.memory.total / 1e9:.1f} GB a GPU; take more GPUs, or training.precision=bf16"
        )
    best = min(one.seconds for one in fitting)
    return min(
        (one for one in fitting if one.seconds <= 1.02 * best),
        key=lambda one: (-one.layout.micro_batch, one.memory.total),
    )
