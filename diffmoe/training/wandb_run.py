"""A run's page on wandb. wandb never stops a run, holds it up for long, or changes how it ends."""

import contextlib
import os
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from diffmoe.config import Config
from diffmoe.files import write_atomically

# Given wandb's module, the fields of a line.
Values = Callable[[ModuleType], dict[str, Any]]

IDENTITY = "wandb_id"
LINES = 1000  # that may wait
START_SECONDS = 15.0  # for the server to answer; then the start is an offline one
FINISH_SECONDS = 30.0  # for what is still to be uploaded; then it stays in the run's folder


class WandbRun:
    """Offline without a key, and where the server does not answer.

    `wandb_id` in the run's folder holds the page's id and how many lines it was given. wandb's own
    step counts those lines, so that it rises over all starts, offline ones too; the x-axis of every
    chart is `samples`. A thread hands the lines over: wandb's process may hang.
    """

    def __init__(
        self, config: Config, samples: int, fork: bool, say: Callable[[str], None]
    ) -> None:
        """samples: the clock at the start. fork: an older checkpoint was resumed, so its points
        go to a new page instead of between those of the old one.
        """
        self.folder, self.say = Path(config.output), say
        self._waiting: queue.Queue[Values | None] = queue.Queue(LINES)
        self._thread: threading.Thread | None = None
        try:
            self._run = self._start(config, samples, fork)
        except Exception as error:
            say(f"wandb is off: {error}")
            return
        self._thread = threading.Thread(target=self._hand_over, daemon=True)
        self._thread.start()

    def _start(self, config: Config, samples: int, fork: bool) -> Any:
        import wandb

        os.environ.setdefault("WANDB_SILENT", "true")
        identity, self._lines = self._read_identity(samples)
        name = self.folder.name
        if fork and identity:
            identity, self._lines, name = None, 0, f"{name}-from-{samples}"
        self._identity = identity or secrets.token_hex(4)
        self._count_lines(0)
        arguments: dict[str, Any] = {
            "project": config.logging.project,
            "name": name,
            "group": self.folder.name,
            "id": self._identity,
            "resume": "allow",
            "dir": self.folder,
            "config": config.model_dump(mode="json"),
            "settings": wandb.Settings(
                init_timeout=START_SECONDS,
                finish_timeout=FINISH_SECONDS,
                finish_timeout_raises=True,
            ),
        }
        mode: Any = os.environ.get("WANDB_MODE")
        if mode is None and not wandb.login(prompt=False, verify=False):
            mode = "offline"
        try:
            run = wandb.init(mode=mode, **arguments)
        except Exception as error:
            if mode not in (None, "online"):
                raise
            self.say(f"wandb is offline, its server did not answer: {str(error).splitlines()[0]}")
            wandb.teardown()  # the failed start still holds the id
            run = wandb.init(mode="offline", **arguments)
        run.define_metric("samples")
        run.define_metric("*", step_metric="samples")
        return run

    def log(self, samples: int, values: Values) -> None:
        """Queue one line; `values` makes its fields, given wandb's module."""
        if self._thread is None:
            return
        try:
            self._waiting.put_nowait(lambda wandb: {"samples": samples, **values(wandb)})
        except queue.Full:
            self.say(
                f"wandb has taken none of the last {LINES} lines and is off for the rest of the run"
            )
            self._stop(self._thread)

    def finish(self) -> None:
        """Upload the rest, for FINISH_SECONDS at most. Call it once nothing else depends on it."""
        if self._thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(None)
        self._thread.join(FINISH_SECONDS + 5)
        if self._thread.is_alive():
            self._say_unfinished()
            self._stop(self._thread)

    def _hand_over(self) -> None:
        import wandb

        try:
            while values := self._waiting.get():
                self._count_lines(1)
                self._run.log(values(wandb), step=self._lines)
        except Exception as error:
            self.say(f"wandb failed and is off for the rest of the run: {error}")
            return
        try:
            self._run.finish()
        except TimeoutError:
            self._say_unfinished()
        except Exception as error:
            self.say(f"wandb failed at the end: {error}")

    def _say_unfinished(self) -> None:
        self.say(
            f"wandb did not finish within {FINISH_SECONDS:g} s; what is not uploaded stays in "
            f"{self.folder / 'wandb'}: `wandb sync --include-online DIR`, DIR being its newest "
            "folder, uploads it"
        )

    def _stop(self, thread: threading.Thread) -> None:
        """End wandb's own process, for which Python would wait at its end."""
        self._thread, self.say = None, lambda _: None
        for process in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("wandb"):
                    process.kill()
        thread.join(5)
        with contextlib.suppress(Exception):
            import wandb

            wandb.teardown()

    def _read_identity(self, samples: int) -> tuple[str | None, int]:
        """The page's id and how many lines it has; older versions counted in samples."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            words = (self.folder / IDENTITY).read_text().split()
            return words[0], int(words[1]) if len(words) > 1 else samples
        return None, 0

    def _count_lines(self, more: int) -> None:
        self._lines += more
        write_atomically(self.folder / IDENTITY, f"{self._identity} {self._lines}\n")
