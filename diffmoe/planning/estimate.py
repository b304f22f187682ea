"""How long a step takes, roughly, and which layout to take."""

from collections.abc import Iterable
from dataclasses import dataclass

from diffmoe.errors import UserError
from diffmoe.planning.activations import activation_bytes
from diffmoe.planning.flops import step_flops
from diffmoe.planning.layouts import Layout
from diffmoe.planning.machine import Machine
from diffmoe.planning.memory import Memory, memory, partition
from diffmoe.planning.traffic import Collective, traffic


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
