"""Fetch items ahead in a thread, so that their consumer need not wait."""

import queue
import threading
from collections.abc import Generator
from typing import NamedTuple, TypeVar

T = TypeVar("T")
READY = 2  # items that are kept ready


class _Failure(NamedTuple):
    error: BaseException


def prefetched(items: Generator[T, None, None], depth: int = READY) -> Generator[T, None, None]:
    """The same items in the same order, with up to `depth` of them fetched ahead by a thread.

    items: closed when the result is closed, unless its current item takes over 5 seconds more.
    """
    ready: queue.Queue[T | _Failure] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | _Failure) -> None:
        while not stopped.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def fetch() -> None:
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    return
            put(_Failure(StopIteration()))
        except BaseException as error:
            put(_Failure(error))

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _Failure):
                if isinstance(item.error, StopIteration):
                    return
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join(5)
        if not thread.is_alive():
            items.close()
