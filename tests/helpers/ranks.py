"""Runs a function on several real processes joined by gloo."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from tests.helpers.ports import free_port

_context = multiprocessing.get_context("forkserver")
# Imported once, in the server from which every rank is forked.
_context.set_forkserver_preload(["tests.helpers.ranks_preload"])


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
        environment = {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
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
        results = []
        try:
            for rank, receiver in enumerate(receivers):
                if not receiver.poll(timeout):
                    raise TimeoutError(
                        f"rank {rank} of {world} gave nothing in {timeout} s: a hang?"
                    )
                try:
                    ok, value = pickle.loads(receiver.recv_bytes())
                except EOFError:
                    raise RuntimeError(f"rank {rank} of {world} died") from None
                if not ok:
                    raise AssertionError(f"rank {rank} of {world}:\n{value}")
                results.append(value)
        finally:
            for process in processes:
                process.join(5 if len(results) == world else 0)
                process.kill()
    return results


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
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
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
