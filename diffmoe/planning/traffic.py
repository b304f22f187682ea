"""Bytes that the collectives of one optimizer step transfer."""

from dataclasses import dataclass

from diffmoe.parallel.matrix_layout import cut_matrices, spans_of
from diffmoe.planning.layouts import Layout
from diffmoe.planning.memory import Group, dense_groups, expert_groups, parameter_groups

F32, F64, INT64 = 4, 8, 8


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in one optimizer step, as seen by one rank.

    bytes: of the rank's input (all_to_all, all_reduce) or output (all_gather), over all calls; on
        average where ranks differ.
    within, between: bytes that it sends to ranks of its own node, and of other nodes.
    """

    name: str
    operation: str
    ranks: int
    bytes: float
    within: float
    between: float


def traffic(layout: Layout) -> list[Collective]:
    """The collectives whose size grows with the model or the batch, and those of routing."""
    sizes, steps = layout.sizes, layout.accumulation
    # Stage 2 does not keep all gradients, so it reduces those of each micro-batch.
    reductions = steps if layout.config.parallel.zero_stage == 2 else 1
    reduced = layout.zero.reduced * reductions
    found = [
        _all_to_all(layout),
        _ring(
            layout,
            "dense gradients",
            1,
            layout.world,
            sizes.dense * reduced,
            2,
        ),
        _ring(
            layout,
            "expert gradients",
            layout.expert_parallel,
            layout.expert_replicas,
            sizes.experts * reduced,
            2,
        ),
        _ring(
            layout,
            "dense parameters",
            1,
            layout.world,
            sum(group.flat * group.element for group in dense_groups(layout)),
            1,
        ),
        _ring(
            layout,
            "expert parameters",
            layout.expert_parallel,
            layout.expert_replicas,
            sum(group.flat * group.element for group in expert_groups(layout)),
            1,
        ),
        _cut_matrices(layout, "dense", 1, dense_groups(layout)),
        _cut_matrices(layout, "expert", layout.expert_parallel, expert_groups(layout)),
        *_routing(layout),
    ]
    return [collective for collective in found if collective.bytes and collective.ranks > 1]


def _all_to_all(layout: Layout) -> Collective:
    """Tokens to their experts and back, and the same for gradients; each way is one all-to-all."""
    P, node = layout.expert_parallel, layout.gpus_per_node
    ways = 4 + 2 * layout.config.training.activation_checkpointing
    moe = layout.config.moe
    sent = ways * layout.rows * layout.config.model.width * layout.element
    ragged = moe.chosen_by_tokens or moe.type == "race" or moe.token_pool != "micro_batch"
    if ragged:  # preceded by counts
        sent += (ways // 2 - 1) * moe.experts * INT64
    sent *= layout.moe_layers * layout.accumulation
    # Groups are contiguous ranks, so as many of a group as possible are on one node.
    near = min(P, node)
    return Collective(
        "tokens to experts and back",
        "all_to_all",
        P,
        sent,
        sent * (near - 1) / P,
        sent * (P - near) / P,
    )


def _cut_matrices(layout: Layout, name: str, stride: int, groups: list[Group]) -> Collective:
    """Muon: to the rank where a matrix begins, and back. Both all-to-alls count what stays."""
    ranks = max(group.ranks for group in groups) if groups else 1
    total, sent = 0, {True: 0, False: 0}  # sent: by whether it stays in its node
    for group in groups:
        spans, start = [], 0
        for stack in group.matrices:
            spans += spans_of(stack, start)
            start += stack.number * stack.size
        for one in cut_matrices(spans, group.own):
            total += 2 * sum(one.parts) * F32
            node = one.first * stride // layout.gpus_per_node
            for rank, part in enumerate(one.parts[1:], one.first + 1):
                sent[rank * stride // layout.gpus_per_node == node] += 2 * part * F32
    return Collective(
        f"{name} matrices in parts",
        "all_to_all",
        ranks,
        total / ranks,
        sent[True] / ranks,
        sent[False] / ranks,
    )


def _ring(layout: Layout, name: str, stride: int, ranks: int, size: int, passes: int) -> Collective:
    """All-reduce (two passes) or all-gather (one pass) over ranks `stride` apart.

    First inside each node, then each GPU its share between nodes, as NCCL does with one network
    card per GPU; no other order sends less between nodes.
    """
    near = max(1, min(ranks, layout.gpus_per_node // stride))
    nodes = ranks // near
    within = passes * size * (near - 1) / near
    between = passes * size / near * (nodes - 1) / nodes
    return Collective(
        name, "all_reduce" if passes == 2 else "all_gather", ranks, size, within, between
    )


def _routing(layout: Layout) -> list[Collective]:
    """Collectives of the gradient norm, routing state and wide pools; small beside the others."""
    moe, L = layout.config.moe, layout.moe_layers
    # Squared norms of each group's gradients, the experts' mean; with offload a flag of overflow.
    groups = len(parameter_groups(layout))
    norms = F32 * (groups + (len(expert_groups(layout)) if layout.expert_replicas > 1 else 0))
    flag = layout.element == 2 and layout.zero.offload
    found = [_ring(layout, "gradient norm", 1, layout.world, norms + flag, 2)]
    state = {"diffmoe": moe.experts, "race": 1, "dsmoe": moe.experts}.get(moe.type, 0) * L
    if not state:
        return found
    ranks = {"micro_batch": 1, "expert_parallel": layout.expert_parallel, "global": layout.world}
    pool, steps = ranks[moe.token_pool], layout.accumulation
    found.append(_ring(layout, "routing state", 1, layout.world, state * F64, 2))
    if pool > 1:
        # A histogram of 256 bins for each of 4 bytes, for the scores and for the predictor's.
        bins = 4 * 256 * INT64 * state * steps * (2 if moe.type == "diffmoe" else 1)
        if moe.type == "race" and moe.similarity_loss_weight:
            bins += L * moe.experts**2 * F32 * steps
        counts = 2 * INT64 * state * steps * pool
        found.append(_ring(layout, "pool's histograms", 1, pool, bins, 2))
        found.append(_ring(layout, "pool's ties", 1, pool, counts, 1))
    return found
