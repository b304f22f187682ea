"""FLOPs of a step; a multiply-add counts as two."""

from diffmoe.parallel.orthogonalize import flops
from diffmoe.planning.layouts import Layout
from diffmoe.planning.memory import parameter_groups
from diffmoe.planning.products import network_products


def forward_flops(layout: Layout) -> int:
    """Of the forward of one micro-batch on one GPU."""
    return network_products(layout).forward


def step_flops(layout: Layout) -> int:
    """Of one optimizer step on one GPU: forward and backward of all micro-batches.

    As far as the backward goes, which leaves out what is frozen. With checkpointing, the forward of
    attention and feed-forwards counts twice where the backward comes through.
    """
    found = network_products(layout)
    work = found.forward + found.backward
    if layout.config.training.activation_checkpointing:
        work += found.recomputed
    return work * layout.accumulation


def newton_schulz_flops(layout: Layout) -> int:
    """Of one optimizer step on one GPU, on average over the ranks; 0 without Muon."""
    muon = layout.config.optimizer.muon
    return sum(
        sum(flops(stack, muon.steps, muon.newton_schulz) for stack in group.matrices) // group.ranks
        for group in parameter_groups(layout)
    )
