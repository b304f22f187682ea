"""Seconds of pieces of work that take turns, so that their ratios survive a busy machine."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

TURN = 0.02  # seconds: a GPU's turn repeats what is shorter, so that the host can run ahead


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Of one of `calls` calls back to back; on a GPU by events of its current stream."""
    synchronize(device)
    if device.type == "cuda":
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            repeat(calls, work)
            end.record()
            torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls  # of milliseconds
    start = time.perf_counter()
    repeat(calls, work)
    return (time.perf_counter() - start) / calls


def repeat(count: int, work: Callable[[], object]) -> None:
    for _ in range(count):
        work()


def calls_of_a_turn(seconds: float) -> int:
    """How often work of so many seconds fills a GPU's turn; 100 at most."""
    return min(100, max(1, math.ceil(TURN / max(seconds, 1e-9))))


@dataclass(frozen=True)
class Rounds:
    """Seconds of every piece of work in every round."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """The median of the rounds' own ratios: what slows a whole round down cancels."""
        pairs = zip(self.seconds[name], self.seconds[other], strict=True)
        return median(one / two for one, two in pairs)


def take_turns(
    works: dict[str, Callable[[], object]], rounds: int, device: torch.device, calls: int = 1
) -> Rounds:
    """A, B, C, A, B, C ... after one round of warm-up that is not counted.

    calls: in each turn, the last of which counts. With 2, work that follows itself in life finds
    its memory where it left it, not where the others' turns have left it. With 1, a GPU's turn
    repeats short work back to back and counts the mean: alone it would mostly measure its launch.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    repeated = dict.fromkeys(works, 1)
    for name, work in works.items():
        repeat(calls, work)
        if device.type == "cuda" and calls == 1:
            # The first call also loaded libraries and compiled.
            repeated[name] = calls_of_a_turn(seconds_of(work, device))
    for _ in range(rounds):
        for name, work in works.items():
            repeat(calls - 1, work)
            seconds[name].append(seconds_of(work, device, repeated[name]))
    return Rounds(seconds)


def forward_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]], *leaves: Tensor
) -> Callable[[], object]:
    """A piece of work: function(*leaves), and the gradients of all leaves.

    The leaves are inputs and parameters that need a gradient; nothing is accumulated.
    """
    gradients: list[Tensor] = []

    def work() -> object:
        results = function(*leaves)
        results = results if isinstance(results, tuple) else (results,)
        if not gradients:
            gradients.extend(torch.randn_like(result) for result in results)
        return torch.autograd.grad(results, leaves, gradients)

    return work
