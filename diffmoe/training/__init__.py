"""The loop and what it needs: batches, EMA, thresholds, checkpoints, telemetry."""

import diffmoe.parallel  # noqa: F401  (before any module here imports DeepSpeed)
