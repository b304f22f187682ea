"""The loop and what it needs: batches, EMA, routing state, checkpoints, telemetry."""

import diffmoe.parallel  # noqa: F401  (before any module here imports DeepSpeed)
