"""Ctrl-C, SIGTERM and SIGUSR1 ask a run to stop; the loop answers at the end of a step."""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """`asked` turns true at the first signal. A second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.asked = False
        for number in SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            os._exit(128 + signal.SIGINT)
        self.asked = True
