"""Worker processes that read ahead, on torch's DataLoader: their start, their end, their memory.

torch passes tensors between processes in files of /dev/shm. A container often has 64 MB there, and
a process that writes more is killed by a bus error; items then go through pipes, pickled.
"""

import atexit
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from functools import partial
from multiprocessing import parent_process
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from diffmoe.data.fetching import end_commands
from diffmoe.data.prefetch import READY
from diffmoe.process.exit import end_process

T = TypeVar("T")
SHARED_MEMORY = Path("/dev/shm")
_AHEAD = 4  # items that each worker keeps ready: enough to bridge the opening of a shard


def items_from_workers(
    make: Callable[[int, int], Iterator[T]],
    workers: int,
    round_bytes: int,
    report: Callable[[str], None],
) -> Generator[T, None, None]:
    """Start workers. Returns their items, one of each in turn; closing it ends the workers.

    make: worker `index` of `workers` yields the items of make(index, workers); it must be
        picklable where processes are not forked.
    round_bytes: memory that one item of each worker takes together.
    report: receives a message if shared memory is too small for the items.
    """
    through_pipes = not _check_shared_memory(round_bytes, report)
    closing = multiprocessing.RawValue("b", 0)
    items: Iterator[Any] = iter(
        DataLoader(
            _Items(make, through_pipes),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=_AHEAD,
            collate_fn=_unchanged,
            worker_init_fn=partial(_start_worker, closing),
            generator=torch.Generator(),  # else every start would draw from the global one
        )
    )
    close = partial(setattr, closing, "value", 1)
    atexit.register(close)  # runs before multiprocessing terminates and joins its children
    return _until_closed(map(pickle.loads, items) if through_pipes else items, close)


def free_shared_memory() -> int | None:
    """Bytes free in shared memory; None if the system has no /dev/shm."""
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None


def fits_shared_memory(size: int) -> bool:
    """Whether each rank on this machine can put `size` bytes into shared memory."""
    free = free_shared_memory()
    return free is None or size * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= free


def _check_shared_memory(round_bytes: int, report: Callable[[str], None]) -> bool:
    """Whether shared memory has room for all items that exist at a time; reports if it has not."""
    # Those that workers keep ready, those prefetched, one being made and one in use.
    size = round_bytes * (_AHEAD + READY + 2)
    if fits_shared_memory(size):
        return True
    report(
        f"{SHARED_MEMORY} has {(free_shared_memory() or 0) / 1e6:.0f} MB free, but batches would "
        f"take {size / 1e6:.0f} MB for each rank: they go through pipes instead, at the cost of a "
        "copy each (to give a container more: docker run --shm-size=8g)"
    )
    return False


def _until_closed(items: Iterator[T], close: Callable[[], None]) -> Generator[T, None, None]:
    try:
        yield from items
    finally:
        close()
        del items  # ends the workers now, even if a traceback keeps this frame
        atexit.unregister(close)


class _Items(IterableDataset):
    """What a worker process yields: its items, or their pickles."""

    def __init__(self, make: Callable[[int, int], Iterator[Any]], pickled: bool):
        self.make, self.pickled = make, pickled

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        assert worker is not None  # without workers there is no such data set
        items = self.make(worker.id, worker.num_workers)
        # torch would put the tensors of an item into shared memory; pickle copies them.
        return map(pickle.dumps, items) if self.pickled else items


def _start_worker(closing: Any, index: int) -> None:
    """Ignore the trainer's signals: it needs data to finish its step. End when it has ended.

    Launchers (torchrun, srun) signal the whole process group, so workers would otherwise end
    first. closing: not 0 while the stream closes; a SIGTERM then comes from DataLoader itself and
    is obeyed.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: end_process(0) if closing.value else None)
    # DataLoader itself checks for the trainer only when an item is taken, which then never happens.
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()
    Finalize(None, end_commands, exitpriority=0)  # atexit does not run in worker processes
    torch.set_num_threads(1)


def _end_with(trainer: BaseProcess) -> None:
    trainer.join()
    end_process(0)


def _unchanged(item: T) -> T:
    return item
