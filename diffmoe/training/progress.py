"""What this rank does, since when, and how long that may take before it counts as hanging."""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator

LEAST = 300.0  # seconds that a step may always take: a shard is retried, a file server restarts
FACTOR = 20  # times the usual step
LONG = 1800.0  # for what happens once in a while: starting, saving, evaluating


class Progress:
    """Of the main thread; `overdue` may be asked by others."""

    def __init__(self, timeout_seconds: float | None = None) -> None:
        """timeout_seconds: of a step; None derives it from the steps so far."""
        self.timeout_seconds = timeout_seconds
        self.doing, self.allowed, self.long = "starting", self._long(), True
        self._since = time.monotonic()
        self._steps: deque[float] = deque(maxlen=50)

    def step(self, number: int) -> None:
        """Step `number` begins; what was since the last call, or the last `busy`, was a step."""
        if not self.long:
            self._steps.append(time.monotonic() - self._since)
        self.doing, self.long = f"step {number}", False
        # The first one compiles, and fills caches.
        self.allowed = self.step_limit if self._steps else self._long()
        self.excuse()

    @property
    def step_limit(self) -> float:
        """Seconds that a step may take."""
        if self.timeout_seconds is not None:
            return self.timeout_seconds
        return max(LEAST, FACTOR * statistics.median(self._steps or [0.0]))

    @contextlib.contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """Around what takes longer than a step; the step in which it stands begins anew then."""
        outer = self.doing, self.allowed, self.long
        self.doing, self.allowed, self.long = doing, self._long(), True
        self.excuse()
        try:
            yield
        finally:
            self.doing, self.allowed, self.long = outer
            self.excuse()

    def excuse(self) -> None:
        """Count anew from now on."""
        self._since = time.monotonic()

    @property
    def overdue(self) -> bool:
        return time.monotonic() - self._since > self.allowed

    def _long(self) -> float:
        return max(LONG, self.timeout_seconds or 0.0)
