"""What a run tells: the progress bar, metrics.jsonl, wandb."""

import contextlib
import json
import math
import os
import resource
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from diffmoe.config import Config
from diffmoe.training import history


class Telemetry:
    """Speaks on rank 0 only; every method does nothing elsewhere."""

    def __init__(self, config: Config, folder: Path, samples: int, active: bool) -> None:
        """samples: the clock at the start; lines of metrics.jsonl beyond it are dropped."""
        self.active = active
        if not active:
            return
        self.path = folder / "metrics.jsonl"
        self._forget_after(samples)
        self.wandb = _start_wandb(config, folder) if config.logging.wandb else None
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

    def say(self, message: str) -> None:
        if self.active:
            with contextlib.suppress(AttributeError):
                self.bar.clear()
            print(message, file=sys.stderr, flush=True)

    def step(self, samples: int, loss: float, gradient_norm: float) -> None:
        if self.active:
            self.bar.set_postfix(loss=f"{loss:.4f}", grad=f"{gradient_norm:.3f}", refresh=False)
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
        self._to_wandb(samples, lambda _: _flattened(values))

    def evaluated(
        self, samples: int, values: dict[str, float], picture: Image.Image, seconds: float
    ) -> None:
        """Tell an evaluation's figures. seconds: it took; they do not count as training."""
        if not self.active:
            return
        self._since += seconds
        told = ", ".join(f"{name} {value:.5g}" for name, value in values.items())
        self.say(f"evaluated at {samples} samples in {seconds:.1f} s: {told}")
        self._to_wandb(samples, lambda wandb: {**values, "samples": wandb.Image(picture)})

    def close(self) -> None:
        if not self.active:
            return
        self.bar.close()
        if self.wandb is not None:
            with contextlib.suppress(Exception):
                self.wandb.finish()

    def _to_wandb(self, samples: int, values: Callable[[ModuleType], dict[str, Any]]) -> None:
        """values: given the module, what to log."""
        if self.wandb is None:
            return
        try:
            import wandb

            self.wandb.log(values(wandb), step=samples)
        except Exception as error:  # a failing wandb never stops a run
            self.say(f"wandb failed and is off from here on: {error}")
            self.wandb = None

    def _forget_after(self, samples: int) -> None:
        """After a resume the steps past the checkpoint are done again, so drop their lines."""

        def before(line: Any) -> bool:
            clock = line.get("samples") if isinstance(line, dict) else None
            return isinstance(clock, (int, float)) and clock <= samples

        history.keep(self.path, before)


def _start_wandb(config: Config, folder: Path) -> Any:
    """A wandb run that goes on after a resume; offline without a key; None if it fails."""
    try:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        mode = os.environ.get("WANDB_MODE") or (None if wandb.api.api_key else "offline")
        identity = folder / "wandb_id"
        if not identity.exists():
            identity.write_text(secrets.token_hex(4))
        return wandb.init(
            project=config.logging.project,
            name=folder.name,
            id=identity.read_text().strip(),
            resume="allow",
            dir=folder,
            mode=mode,
            config=config.model_dump(mode="json"),
        )
    except Exception as error:  # a failing wandb never stops a run
        print(f"wandb is off: {error}", file=sys.stderr)
        return None


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
