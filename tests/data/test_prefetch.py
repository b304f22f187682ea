import threading
import time

import pytest

from diffmoe.data.prefetch import prefetched


def test_items_come_in_order_and_end():
    assert list(prefetched(iter_of(range(50)))) == list(range(50))


def test_an_error_comes_after_the_items_before_it():
    def failing():
        yield 1
        yield 2
        raise ValueError("broken")

    items = prefetched(failing())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_no_more_than_depth_and_one_in_hand_are_made_ahead():
    made = []
    items = prefetched(iter_of(range(100), made), depth=2)
    next(items)
    time.sleep(0.3)
    assert len(made) <= 4
    items.close()


def test_closing_closes_the_source_and_ends_the_thread():
    closed = threading.Event()

    def source():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    items = prefetched(source())
    next(items)
    items.close()
    assert closed.is_set()
    assert threading.active_count() == before


def iter_of(values, made=None):
    for value in values:
        if made is not None:
            made.append(value)
        yield value
