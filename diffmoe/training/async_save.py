"""Writes checkpoints in the background: training waits only for a copy of this rank's pieces."""

import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from diffmoe.checkpoints import folder, lifecycle
from diffmoe.checkpoints.checksums import Checksums
from diffmoe.checkpoints.pieces import HostCopy, write_pieces
from diffmoe.checkpoints.run_file import Origin, RunFile
from diffmoe.clock import Clock
from diffmoe.config import Config
from diffmoe.data.manifest import Manifest
from diffmoe.errors import UserError
from diffmoe.files import write_atomically
from diffmoe.models.dit import DiT
from diffmoe.models.precision import DTYPES
from diffmoe.parallel.agree import from_first_rank
from diffmoe.parallel.engine import Engine
from diffmoe.training.checkpoint import all_finite, describe, for_sampling, pieces
from diffmoe.training.ema import EMA
from diffmoe.training.lease import Lease
from diffmoe.training.watchdog import COLLECTIVES, busy


class Saver:
    """At most one save is under way; the next one waits for it.

    A thread of every rank writes that rank's copy and talks to the others over a group of its own,
    because collectives of one group must not come from two threads.
    """

    def __init__(
        self,
        engine: Engine,
        network: DiT,
        ema: EMA,
        config: Config,
        manifest: Manifest,
        say: Callable[[str], None],
        lease: Lease,
        origin: Origin | None = None,
    ) -> None:
        """say: tells rank 0's user. lease: of the folder. origin: see `describe`."""
        self.engine, self.network, self.ema = engine, network, ema
        self.config, self.manifest, self.say = config, manifest, say
        self.lease, self.origin = lease, origin
        self.folder = Path(config.output)
        self.first = dist.get_rank() == 0
        self.group = dist.new_group(backend="gloo", timeout=COLLECTIVES)
        # A run that was taken over may still be writing when it wakes.
        self._writer = from_first_rank(secrets.token_hex(4))
        self._copies = {
            "step": HostCopy(),
            "ema": HostCopy(DTYPES[config.training.snapshot_precision]),
        }
        # Fresh pages cost more than copying: touched here, they do not hold up the first save.
        state = pieces(engine, network, ema)
        self._copies["step"].take(state)
        if config.training.snapshot_samples:
            self._copies["ema"].take(for_sampling(state))
        self._thread: threading.Thread | None = None
        self._problem: str | None = None

    def begin(self, clock: Clock, *kinds: str) -> None:
        """Begin to save; every rank calls it. Raises UserError if an earlier failure is to end it,
        or if the weights are not finite.

        kinds: `step` is all that a resume needs, as step-XXXXXXXX; `ema` the averages alone, as
            ema-XXXXXXXX.
        """
        began = time.monotonic()
        if self._thread is not None:
            with busy("waiting for a save"):
                self._thread.join()
        if self.failed:
            self.wait()
        self._problem = None
        if not all_finite(self.engine, self.ema):
            raise UserError(
                f"weights or averages are not finite after step {clock.step}, so this step is "
                f"not saved. Look at {self.folder / 'metrics.jsonl'} for when the loss or the "
                "gradient norm grew; lower optimizer.learning_rate or set "
                "optimizer.gradient_clipping, and resume an earlier checkpoint"
            )
        state = pieces(self.engine, self.network, self.ema)
        chosen = {"step": state, "ema": for_sampling(state)}
        copies = {
            self.folder / f"{kind}-{clock.step:08d}": self._copies[kind].take(chosen[kind])
            for kind in kinds
        }
        record = describe(self.engine, self.network, self.config, self.manifest, clock, self.origin)
        arguments = (copies, record, time.monotonic() - began)
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether the last save has failed and the run is to end for that."""
        return self._problem is not None and self.config.training.save_failure == "stop"

    def wait(self) -> None:
        """Wait for the save under way. Raises UserError, on every rank, if the last save failed."""
        if self._thread is not None:
            with busy("waiting for a save"):
                self._thread.join()
            self._thread = None
        if self._problem is not None:
            raise UserError(self._problem)

    def _run(self, copies: dict[Path, dict[str, Tensor]], record: RunFile, stalled: float) -> None:
        for path, state in copies.items():
            began = time.monotonic()
            try:
                problem = self._write(path, state, record)
            except BaseException as error:  # a collective broke: some rank is gone
                self._problem = f"{path} was not saved: {error}"
                return
            if problem is None:
                writing = time.monotonic() - began
                self.say(
                    f"saved {path} (training waited {stalled:.2f} s, written in {writing:.2f} s)"
                )
            else:
                self._fail(path, problem)

    def _fail(self, path: Path, problem: str) -> None:
        found = folder.names(self.folder)
        self._problem = (
            f"{path} was not saved: {problem}. "
            + (f"{self.folder / found[-1]} remains the newest checkpoint. " if found else "")
            + "On a full disk, free space, or remove older checkpoints and set "
            "training.keep_last lower"
        )
        if self.config.training.save_failure == "continue":
            self.say(
                f"warning: {self._problem}. The run goes on and tries again at the next interval "
                "(training.save_failure=continue)"
            )

    def _write(self, path: Path, state: dict[str, Tensor], record: RunFile) -> str | None:
        """What was wrong on the first rank that failed, the same on all ranks; None if nothing."""
        torn = lifecycle.temporary(path, self._writer)

        def prepare(_: None) -> None:
            self.lease.check()
            lifecycle.remove(torn)
            torn.mkdir(parents=True)

        def commit(written: list[Checksums]) -> None:
            self.lease.check()
            files = {name: entry for hashes in written for name, entry in hashes.items()}
            lifecycle.commit(torn, path, record, files)

        problem = self._on_first_rank(prepare, None)
        if problem is None:
            try:
                mine: Checksums | str = write_pieces(state, torn, self.group)
            except OSError as error:
                mine = str(error)
            everyone: list | None = [None] * dist.get_world_size() if self.first else None
            dist.gather_object(mine, everyone, group=self.group)
            problems = [told for told in everyone or [] if isinstance(told, str)]
            problem = self._on_first_rank(commit, everyone, problems[0] if problems else None)
        if self.first:
            if problem is not None:
                lifecycle.remove(torn)
            elif problem is None and path.name.startswith("step-"):
                self._tidy(path)
        return problem

    def _on_first_rank(
        self, work: Callable[[Any], None], argument: Any, problem: str | None = None
    ) -> str | None:
        """Run it on rank 0, unless there is a problem; every rank learns the result."""
        if self.first and problem is None:
            try:
                work(argument)
            except Exception as error:  # whatever it is, the others wait to hear of it
                problem = f"rank 0: {error}"
        outcome = [problem]
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        return outcome[0]

    def _tidy(self, newest: Path) -> None:
        """`latest` and retention: the checkpoint is complete whether these succeed or not."""
        training = self.config.training
        try:
            self.lease.check()
            write_atomically(self.folder / "latest", newest.name)
            lifecycle.prune(self.folder, training.keep_last, training.keep_samples)
        except (OSError, UserError) as error:
            self.say(f"warning: {newest} is complete, but tidying {self.folder} failed: {error}")
