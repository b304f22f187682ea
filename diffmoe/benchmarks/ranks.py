"""A process group for a benchmark: of this process alone, or of ranks that it starts."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

import diffmoe.parallel.zero  # noqa: F401  it keeps DeepSpeed from compiling an extension
from diffmoe.parallel.backend import ON_GPUS
from diffmoe.parallel.device import setup_device


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """This process as a world of one, as DeepSpeed wants it."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # DeepSpeed's engine takes the current one
    _join(dist.HashStore(), 0, 1, device)
    try:
        yield
    finally:
        dist.destroy_process_group()


def on_ranks(world: int, function: Callable[..., Any], *args: Any) -> Any:
    """Call function(*args) on `world` new processes with one thread each; what rank 0 returned.

    function: of a module, for the processes import it. A rank that fails raises here. With fewer
    GPUs than ranks they compute on the CPU and see no GPU, as DeepSpeed would take one that it saw.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        place = os.path.join(folder, "store")
        ranks = [
            context.Process(target=_rank, args=(rank, world, place, sender, function, args))
            for rank in range(world)
        ]
        with _hidden_gpus() if device_of_ranks(world) == "cpu" else nullcontext():
            for rank in ranks:
                rank.start()
        sender.close()
        try:
            ok, value = receiver.recv()
        except EOFError:
            raise RuntimeError("a rank died without reporting an error") from None
        finally:
            for rank in ranks:
                rank.join(10)
                rank.kill()
    if not ok:
        raise RuntimeError(value)
    return value


def device_of_ranks(world: int) -> str:
    """cuda where each rank has a GPU of its own, else cpu."""
    return "cuda" if torch.cuda.device_count() >= world else "cpu"


def rank_device() -> torch.device:
    """This rank's, of those of `on_ranks`."""
    if device_of_ranks(dist.get_world_size()) == "cuda":
        return setup_device(f"cuda:{dist.get_rank()}")
    return setup_device("cpu")


@contextmanager
def _hidden_gpus() -> Iterator[None]:
    """From processes that start meanwhile."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def forget_groups() -> None:
    """Make way for another `create_topology`; the groups of the last one stay usable."""
    from megatron.core import parallel_state  # create_topology imports it without its noise

    parallel_state.destroy_model_parallel()


def _join(store: dist.Store, rank: int, world: int, device: torch.device) -> None:
    os.environ["LOCAL_RANK"] = str(rank)  # DeepSpeed asks for it
    backend = ON_GPUS if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _rank(
    rank: int, world: int, place: str, sender: Any, function: Callable[..., Any], args: tuple
) -> None:
    torch.set_num_threads(1)
    try:
        device = device_of_ranks(world)
        if device == "cuda":
            torch.cuda.set_device(rank)
        _join(dist.FileStore(place, world), rank, world, torch.device(device))
        value = function(*args)
        if rank == 0:
            sender.send((True, value))
        dist.barrier()
    except BaseException:
        sender.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
    finally:
        sender.close()
        os._exit(0)  # gloo may abort while the interpreter shuts down
