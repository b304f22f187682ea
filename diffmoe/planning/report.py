"""Plans as text for the user."""

import math
from dataclasses import fields

from diffmoe.planning.estimate import Plan
from diffmoe.planning.layouts import Layout
from diffmoe.planning.memory import CONTEXT_BYTES, FRAGMENTATION, Memory

GB = 1e9
KINDS = [field.name for field in fields(Memory)]


def plan_table(plans: list[Plan]) -> str:
    """One line per layout: GB per GPU by kind, total, seconds per step, and whether it fits."""
    heads = {"activations": "activ.", "gradients": "grads", "parameters": "params"}
    names = [heads.get(kind, kind.replace("_", "-")) for kind in KINDS]
    width = max(len(one.layout.describe()) for one in plans)
    lines = [
        "GB per GPU".ljust(width) + "".join(f"{name:>11}" for name in names) + "  total  s/step"
    ]
    for one in plans:
        kinds = "".join(f"{getattr(one.memory, kind) / GB:11.2f}" for kind in KINDS)
        lines.append(
            one.layout.describe().ljust(width)
            + kinds
            + f"{one.memory.total / GB:7.1f}{one.seconds:8.3f}"
            + _misfit(one)
        )
    return "\n".join(lines)


def _misfit(one: Plan) -> str:
    if one.fits:
        return ""
    return "  does not fit" if not one.fits_gpu else "  does not fit the node's host memory"


def plan_details(one: Plan, node_memory: float) -> str:
    """The layout as settings of train.py, its memory, and the traffic of its collectives.

    node_memory: bytes of host memory that a job gets on each node.
    """
    layout, needed, host = one.layout, one.memory, one.host
    batch = layout.config.training.batch_size
    lines = [
        _settings(one),
        f"  memory: {needed.tensors / GB:.2f} GB of tensors, {needed.total / GB:.1f} GB with "
        f"{FRAGMENTATION - 1:.0%} lost by the allocator and {CONTEXT_BYTES / GB:.1f} GB for CUDA "
        f"and libraries; {'fits' if one.fits_gpu else 'does not fit'}",
        f"  host memory: {host.total / GB:.1f} GB per node{_given(one, node_memory)}: "
        f"{host.processes / GB:.1f} for processes, plus the larger of",
        f"    {host.network / GB:.1f} for initial weights, and {host.saves / GB:.1f} for saving "
        f"+ {host.states / GB:.1f} for offloaded states + {host.loader / GB:.1f} for batches",
        f"  work: {one.flops / 1e12:.2f} TFLOP per GPU and step; about {one.seconds:.3f} s/step, "
        f"{batch / one.seconds:.0f} samples/s",
        *_features(layout),
        "  collectives of one step, MB sent per GPU:            in its node  between nodes",
    ]
    lines += [
        f"    {c.operation + ' of ' + c.name + f' over {c.ranks} ranks':<56}"
        f"{c.within / 1e6:10.2f} {c.between / 1e6:14.2f}"
        for c in one.traffic
    ]
    return "\n".join(lines)


def _features(layout: Layout) -> list[str]:
    """What an aligned run reads beside its latents."""
    size, batch = layout.features_per_sample, layout.config.training.batch_size
    if not size:
        return []
    step = size * batch // layout.world
    return [
        f"  features to align with: {size / 1e3:.1f} kB per sample, {step / 1e6:.1f} MB read per "
        "GPU and step, if their grid is that of the tokens"
    ]


def _given(one: Plan, node_memory: float) -> str:
    if math.isinf(node_memory):
        return ""
    return f" of {node_memory / GB:.1f}, {'fits' if one.fits_node else 'does not fit'}"


def _settings(one: Plan) -> str:
    config = one.layout.config
    return (
        f"parallel.expert_parallel={config.parallel.expert_parallel} "
        f"parallel.zero_stage={config.parallel.zero_stage} "
        f"training.accumulation={config.training.accumulation} "
        f"training.activation_checkpointing={str(config.training.activation_checkpointing).lower()}"
    )
