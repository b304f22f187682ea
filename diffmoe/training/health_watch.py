"""Warns, once for each kind, when routing stays in a state that is known to mean trouble."""

from typing import Any

from diffmoe.capacity.health import TROUBLES

# Lines of metrics in a row before it is said: a new network and an odd batch are no trouble yet.
PATIENCE = 3


class HealthWatch:
    """Sees each line of metrics."""

    def __init__(self) -> None:
        self._seen = dict.fromkeys((trouble.metric for trouble in TROUBLES), 0)

    def warnings(self, routing: dict[str, Any]) -> list[str]:
        """What is to be said now. routing: of RoutingMetrics.summary; {} for a dense network."""
        messages = []
        for trouble in TROUBLES:
            told = trouble.told(routing.get(trouble.metric, []))
            seen = self._seen[trouble.metric]
            self._seen[trouble.metric] = seen + 1 if told or seen >= PATIENCE else 0
            if told and seen + 1 == PATIENCE:
                messages.append(f"warning: {told}")
        return messages
