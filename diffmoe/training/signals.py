"""Ctrl-C, SIGTERM and SIGUSR1 ask a run to stop; the loop answers at the end of a step."""

import os
import signal
from types import FrameType

import torch.distributed as dist

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """`asked` turns true at the first signal. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        self.by: str | None = None  # the first signal's name
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            os._exit(128 + signal.SIGINT)
        self.by = self.by or signal.Signals(number).name
        self.asked = True

    def told(self) -> str:
        """What stopped the run, such as `SIGTERM to rank 1`. Every rank calls it."""
        everyone: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.by)
        parts = []
        for name in sorted({name for name in everyone if name}):
            ranks = [rank for rank, by in enumerate(everyone) if by == name]
            whom = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks"
            parts.append(name if len(everyone) == 1 else f"{name} to {whom}")
        return " and ".join(parts)
