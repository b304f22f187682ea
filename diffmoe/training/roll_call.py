"""When steps stop ending: what every rank reports about itself, and which ranks are waited for."""

import sys
import threading
from typing import Any, NamedTuple

import torch.distributed.distributed_c10d as c10d

from diffmoe.parallel.agree import ranks_named


class State(NamedTuple):
    """One rank's answer."""

    doing: str  # such as "step 12"
    excused: bool  # busy with something that may take long, and not for too long yet
    place: str  # where its main thread is
    collectives: dict[str, int]  # how many this rank has begun, by the name of their group


def own_state(doing: str, excused: bool) -> State:
    return State(doing, excused, _place(), _collectives())


def not_arrived(states: dict[int, State]) -> list[int]:
    """The ranks that others wait for, and that wait for nobody themselves.

    A rank waits for another if it has begun more collectives of a group of both.
    """
    waiting, awaited = set(), set()
    for rank, state in states.items():
        for other, theirs in states.items():
            both = state.collectives.keys() & theirs.collectives.keys()
            if any(state.collectives[group] > theirs.collectives[group] for group in both):
                waiting.add(rank)
                awaited.add(other)
    return sorted(awaited - waiting)


def verdict(states: dict[int, State], world: int, seconds: float) -> str:
    """Which ranks did not arrive, as a sentence. states: of the ranks that answered."""
    silent = [rank for rank in range(world) if rank not in states]
    missing = silent or not_arrived(states) or ([0] if world == 1 else [])
    if missing:
        first = f"{ranks_named(missing)} did not arrive: "
    else:
        first = "all ranks wait in the same collective (the network, or a GPU, hangs): "
    lines = [
        f"  rank {rank}, {states[rank].doing}: {states[rank].place}"
        if rank in states
        else f"  rank {rank}: does not answer"
        for rank in (missing or list(range(world)))[:8]
    ]
    return (
        f"{first}no progress for {seconds:g} s (parallel.timeout_seconds)\n"
        + "\n".join(lines)
        + "\nthe stacks of all threads of every rank are in its log"
    )


def _place() -> str:
    frame: Any = sys._current_frames()[threading.main_thread().ident or 0]
    code = frame.f_code
    return f"{code.co_filename}, line {frame.f_lineno}, in {code.co_name}"


def _collectives() -> dict[str, int]:
    groups: list[Any] = list(c10d._world.pg_map)
    return {str(c10d._world.pg_names[one]): one._get_sequence_number_for_group() for one in groups}
