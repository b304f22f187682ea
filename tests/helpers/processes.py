"""train.py on several ranks without a launcher that would end the others: to be killed one by one.

As srun starts them, but forked from a server that has imported everything: a second, not ten.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

from diffmoe.config import Config
from tests.helpers.commands import write_config
from tests.helpers.ports import free_port
from tests.helpers.ranks import _context


class Ranks:
    """processes: by rank. Each writes what it tells into a file of its own."""

    def __init__(
        self,
        config: Config,
        world: int,
        prepare: Callable[[int], None] | None = None,
        arguments: tuple[str, ...] = (),
    ) -> None:
        """prepare: called on every rank before the command; can be sent to a process."""
        joined = {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        argv = ["--config", write_config(config), "--device", "cpu", *arguments]
        self.logs = [Path(f"{config.output}.rank{rank}.log") for rank in range(world)]
        for log in self.logs:  # of an earlier start
            log.unlink(missing_ok=True)
        self.processes: list[BaseProcess] = []
        for rank in range(world):
            own = {**joined, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _context.Process(target=_main, args=(argv, own, self.logs[rank], prepare))
            process.start()
            self.processes.append(process)

    def told(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())

    def wait(self, seconds: float = 60) -> list[int | None]:
        """Exit codes; None for a rank that is still there after that time."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def kill(self, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, signal.SIGKILL)


@contextlib.contextmanager
def ranks_of(config: Config, world: int, *more, **named) -> Iterator[Ranks]:
    ranks = Ranks(config, world, *more, **named)
    try:
        yield ranks
    finally:
        ranks.kill()
        ranks.wait()


def _main(
    argv: list[str],
    environment: dict[str, str],
    log: Path,
    prepare: Callable[[int], None] | None,
) -> None:
    import torch

    os.setpgid(0, 0)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ |= environment
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = ["train.py", *argv]
    import train

    if prepare is not None:
        prepare(int(environment["RANK"]))
    code = train.main()
    sys.stderr.flush()
    os._exit(code)
