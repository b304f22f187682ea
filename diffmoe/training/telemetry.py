"""What a run reports: the progress bar, metrics.jsonl, wandb."""

import contextlib
import json
import math
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from diffmoe.config import Config
from diffmoe.training import history
from diffmoe.training.wandb_run import WandbRun


class Telemetry:
    """Speaks on rank 0 only; every method does nothing elsewhere."""

    def __init__(self, config: Config, active: bool) -> None:
        self.config, self.active = config, active
        self.path = Path(config.output) / "metrics.jsonl"
        self.wandb: WandbRun | None = None

    def begin(self, samples: int, fork: bool = False) -> None:
        """samples: the clock at the start; lines of metrics.jsonl beyond it are dropped.

        fork: an older checkpoint was resumed although there were newer ones.
        """
        if not self.active:
            return
        config = self.config
        self._forget_after(samples)
        if config.logging.wandb:
            self.wandb = WandbRun(config, samples, fork, self.say)
        self.bar = tqdm(
            total=config.training.total_samples,
            initial=samples,
            unit="samples",
            unit_scale=True,
            dynamic_ncols=True,
            # A log file gets a line now and then, a terminal a moving bar.
            mininterval=0.5 if sys.stderr.isatty() else 30,
        )
        self._since, self._samples = time.monotonic(), samples
        self._validated: dict[str, str] = {}

    def say(self, message: str) -> None:
        if self.active:
            with contextlib.suppress(AttributeError):
                self.bar.clear()
            print(message, file=sys.stderr, flush=True)

    def step(self, samples: int, loss: float, gradient_norm: float) -> None:
        if self.active:
            numbers = {"loss": f"{loss:.4f}", "grad": f"{gradient_norm:.3f}", **self._validated}
            self.bar.set_postfix(numbers, refresh=False)
            self.bar.update(samples - self.bar.n)

    def metrics(self, samples: int, values: dict[str, Any]) -> None:
        """Write one line; speed is counted since the last one."""
        if not self.active:
            return
        now = time.monotonic()
        values = {
            "samples": samples,
            **values,
            "samples_per_second": (samples - self._samples) / (now - self._since),
            "memory_gib": _peak_memory_gib(),
        }
        self._since, self._samples = now, samples
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(_strict(values), allow_nan=False) + "\n")
        except OSError as error:  # a full disk costs lines, not the run
            self.say(f"warning: {self.path} lacks the line of {samples} samples: {error}")
        if self.wandb is not None:
            self.wandb.log(samples, lambda _: _flattened(values))

    def validated(self, metrics: Mapping[str, Any], seconds: float) -> None:
        """Show the held-out loss beside that of training. seconds do not count as training."""
        if self.active:
            self._since += seconds
            self._validated = {"held_out": f"{metrics['validation_loss']:.4f}"}

    def evaluated(
        self, samples: int, values: dict[str, float], picture: Image.Image, seconds: float
    ) -> None:
        """Report an evaluation's figures. seconds: its duration, not counted as training."""
        if not self.active:
            return
        self._since += seconds
        figures = ", ".join(f"{name} {value:.5g}" for name, value in values.items())
        self.say(f"evaluated at {samples} samples in {seconds:.1f} s: {figures}")
        if self.wandb is not None:
            self.wandb.log(samples, lambda wandb: {**values, "images": wandb.Image(picture)})

    def close(self) -> None:
        if self.active:
            self.bar.close()

    def finish(self) -> None:
        """Upload what wandb still has. Call it last: a slow server takes its time here."""
        if self.active and self.wandb is not None:
            self.wandb.finish()

    def _forget_after(self, samples: int) -> None:
        """After a resume the steps past the checkpoint are done again, so drop their lines."""

        def before(line: Any) -> bool:
            clock = line.get("samples") if isinstance(line, dict) else None
            return isinstance(clock, (int, float)) and clock <= samples

        history.keep(self.path, before)


def _strict(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_strict(item) for item in value]
    return value


def _flattened(values: dict[str, Any]) -> dict[str, float]:
    """Lists become keys with a number: thresholds/0/3 is layer 0, expert 3."""
    flat: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, list):
            flat |= {
                f"{key}/{inner}": number
                for inner, number in _flattened({str(i): v for i, v in enumerate(value)}).items()
            }
        else:
            flat[key] = value
    return flat


def _peak_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
