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
            values = routing.get(trouble.metric, [])
            layers = trouble.layers(values)
            seen = self._seen[trouble.metric]
            self._seen[trouble.metric] = seen + 1 if layers or seen >= PATIENCE else 0
            if not layers or seen + 1 != PATIENCE:
                continue
            worst = (max if trouble.above else min)(values[layer] for layer in layers)
            where = ", ".join(map(str, layers))
            messages.append(
                f"warning: MoE layer {where} of {len(values)} (from 0), {trouble.metric}: "
                + trouble.meaning.format(value=worst)
            )
        return messages
