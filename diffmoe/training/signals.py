"""Ctrl-C, SIGTERM, SIGUSR1, SIGHUP or the end of the launcher ask a run to stop.

The loop answers at the end of a step.
"""

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import Any

import torch.distributed as dist

from diffmoe.process import launcher
from diffmoe.process.exit import end_process

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class StopRequest:
    """`asked` turns true at the first signal. A second Ctrl-C ends the process at once.

    nohup has SIGHUP ignored, and so it stays; but torchrun, which does not ignore it even then,
    hands it on when it is about to end its ranks.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}
        for number in SIGNALS:
            ignored = signal.getsignal(number) == signal.SIG_IGN
            if number != signal.SIGHUP or not ignored or launcher.holds_the_store():
                self._before[number] = signal.signal(number, self._receive)

    def close(self) -> None:
        """Signals do again what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        return self.reason is not None

    @property
    def reason(self) -> str | None:
        """What asked, such as `SIGTERM`; None if nothing has."""
        if self._received is not None:
            return signal.Signals(self._received).name
        gone = launcher.gone()
        return gone and f"the end of {gone}"

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            end_process(128 + signal.SIGINT)
        if (
            self._received is None
            and number == signal.SIGINT
            and os.environ.get("RANK", "0") == "0"
        ):
            note = b"\nCtrl-C: the run ends after this step and saves; again, it ends at once\n"
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), note)  # a print may stand in another one
        self._received = self._received or number

    def reason_of_all_ranks(self) -> str:
        """What stopped the run, such as `SIGTERM to rank 1`. Every rank calls it."""
        everyone: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.reason)
        parts = []
        for reason in sorted({reason for reason in everyone if reason}):
            ranks = [rank for rank, one in enumerate(everyone) if one == reason]
            whom = f"rank {ranks[0]}" if len(ranks) == 1 else f"{len(ranks)} ranks"
            parts.append(reason if len(everyone) == 1 else f"{reason} to {whom}")
        return " and ".join(parts)
