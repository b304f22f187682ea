"""What sharing the experts costs: P = 2 beside P = 1 on the same two ranks, and wide pools."""

from collections.abc import Callable
from typing import Any

from diffmoe.benchmarks.collectives import Collectives
from diffmoe.benchmarks.ranks import forget_groups, on_ranks, rank_device
from diffmoe.benchmarks.report import Report
from diffmoe.benchmarks.timing import Rounds, take_turns
from diffmoe.benchmarks.training import TimedStep, random_batches
from diffmoe.config import Config
from diffmoe.parallel.topology import create_topology

WORLD = 2
LAYOUTS = {  # name: (P, moe.token_pool)
    "P=1": (1, "micro_batch"),
    "P=2": (2, "micro_batch"),
    "P=2, pool of the group": (2, "expert_parallel"),
    "P=1, pool of all ranks": (1, "global"),
}


def measured_on_rank(config: Config, rounds: int) -> tuple[Rounds, dict[str, Any]]:
    """(seconds of a step by layout, (calls, bytes) of its collectives by layout and kind)."""
    device = rank_device()
    config = config.replace({"data.workers": 0})  # batches are read beforehand
    steps: dict[str, Callable[[], object]] = {}
    sent = {}
    for name, (ranks, pool) in LAYOUTS.items():
        topology = create_topology(ranks)
        changed = config.replace({"parallel.expert_parallel": ranks, "moe.token_pool": pool})
        with random_batches(changed, topology) as batches:
            stored = [next(batches) for _ in range(2)]
        steps[name] = TimedStep(changed, topology, device, _again(stored))
        forget_groups()
    timed = take_turns(steps, rounds, device, calls=2)
    for name, step in steps.items():
        with Collectives() as counted:
            step()
        sent[name] = {kind: (counted.calls[kind], counted.bytes[kind]) for kind in counted.calls}
    return timed, sent


def _again(batches: list) -> Any:
    while True:
        yield from batches


def benchmark_expert_parallel(config: Config, rounds: int, report: Report) -> None:
    timed, sent = on_ranks(WORLD, measured_on_rank, config, rounds)
    base = next(iter(LAYOUTS))
    for name in LAYOUTS:
        target = 1.10 if name == "P=2" else None
        ratio = None if name == base else timed.ratio(name, base)
        report.add(f"{name}: step (ratio: to {base})", timed.median(name), "s", ratio, target)
        for kind, (calls, size) in sent[name].items():
            report.add(f"{name}: {kind}, a step and rank", calls, "calls")
            report.add(f"{name}: {kind}, a step and rank", size / 2**20, "MiB")
    report.add(
        "pool of the group beside the default, P=2",
        timed.median("P=2, pool of the group"),
        "s",
        timed.ratio("P=2, pool of the group", "P=2"),
    )
