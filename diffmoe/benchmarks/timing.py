"""Seconds of pieces of work that take turns, so that their ratios survive a busy machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


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
    its memory where it left it, not where the others' turns have left it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name, work in works.items():
            for _ in range(calls - 1):
                work()
            taken = seconds_of(work, device)
            if turn:
                seconds[name].append(taken)
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
