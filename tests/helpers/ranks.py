"""Real processes joined by gloo: `run_ranks` calls a function on each, `Ranks` runs train.py.

Ranks start as srun starts them, without a launcher that would end the others, but are forked from
a server that has imported everything: a second, not ten.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from diffmoe.config import Config
from tests.helpers.processes import free_port, write_config

_context = multiprocessing.get_context("forkserver")
# Imported once, in the server from which every rank is forked. Not the watchdog: until train.py has
# imported it, an error is told in another way.
_context.set_forkserver_preload(
    [
        "megatron.core.parallel_state",
        "diffmoe.parallel.zero",
        "diffmoe.training.checkpoint",
        "diffmoe.training.preflight",
        "deepspeed.runtime.zero.muon.muon_optimizer",  # every engine imports it
    ]
)


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 120,
    connect: bool = True,
) -> list:
    """Call function(*args) on `world` ranks; their results in rank order.

    function must be importable (a module's own, not a closure). A rank that raises, dies or hangs
    past `timeout` seconds fails the test with its traceback.
    connect: join the ranks by gloo first; else they find a launcher's environment variables.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = joined(world)
        receivers, processes = [], []
        for rank in range(world):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank_main,
                args=(rank, environment, folder if connect else None, sender, function, args),
            )
            process.start()
            sender.close()
            receivers.append(receiver)
            processes.append(process)
        results: dict[int, Any] = {}
        deadline = time.monotonic() + timeout
        try:
            while len(results) < world:
                waiting = [one for rank, one in enumerate(receivers) if rank not in results]
                # The first that fails says why the others wait for it.
                ready = wait(waiting, max(0.0, deadline - time.monotonic()))
                if not ready:
                    ranks = [rank for rank in range(world) if rank not in results]
                    raise TimeoutError(f"ranks {ranks} gave nothing in {timeout} s: a hang?")
                for receiver in ready:
                    rank = receivers.index(receiver)
                    try:
                        ok, value = pickle.loads(receiver.recv_bytes())
                    except EOFError:
                        raise RuntimeError(f"rank {rank} of {world} died") from None
                    if not ok:
                        raise AssertionError(f"rank {rank} of {world}:\n{value}")
                    results[rank] = value
        finally:
            for process in processes:
                process.join(5 if len(results) == world else 0)
                process.kill()
    return [results[rank] for rank in range(world)]


def joined(world: int) -> dict[str, str]:
    """This process's environment, with what a launcher adds for all ranks."""
    return os.environ | {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }


def of_rank(environment: dict[str, str], rank: int) -> dict[str, str]:
    return environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}


def take_environment(environment: dict[str, str]) -> None:
    """In a forked process: the test's, instead of what the server had when it was started."""
    os.environ.clear()
    os.environ.update(environment)


def _rank_main(
    rank: int,
    environment: dict[str, str],
    folder: str | None,
    sender: Any,
    function: Callable[..., Any],
    args: tuple,
) -> None:
    import deepspeed
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    take_environment(of_rank(environment, rank))
    try:
        if folder is not None:
            world = int(environment["WORLD_SIZE"])
            store = dist.FileStore(os.path.join(folder, "store"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
            deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
        # Plain bytes: torch's own way of sending tensors needs the sender to stay alive.
        sender.send_bytes(pickle.dumps((True, function(*args))))
        if dist.is_initialized():
            dist.barrier()
    except BaseException:
        sender.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        sender.close()
        os._exit(0)  # gloo may abort while the interpreter shuts down


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
        environment = joined(world)
        argv = ["--config", write_config(config), "--device", "cpu", *arguments]
        self.logs = [Path(f"{config.output}.rank{rank}.log") for rank in range(world)]
        for log in self.logs:  # of an earlier start
            log.unlink(missing_ok=True)
        self.processes: list[BaseProcess] = []
        for rank in range(world):
            process = _context.Process(
                target=_train_main,
                args=(argv, of_rank(environment, rank), self.logs[rank], prepare),
            )
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


def _train_main(
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
    take_environment(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)
    sys.argv = ["train.py", *argv]
    import train

    if prepare is not None:
        prepare(int(environment["RANK"]))
    code = train.main()
    sys.stderr.flush()
    os._exit(code)
