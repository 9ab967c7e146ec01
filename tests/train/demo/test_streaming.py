"""Work as an iterator."""

from __future__ import annotations

import threading

import pytest

from tokenflow_ext.train.demo.streaming import streamed


def test_items_come_as_they_are_emitted():
    gate = threading.Event()

    def work(emit):
        emit(1)
        gate.wait(10)
        emit(2)

    items = streamed(work)
    assert next(items) == 1  # before the work is done
    gate.set()
    assert list(items) == [2]


def test_an_error_of_the_work_is_raised_after_its_items():
    def work(emit):
        emit("first")
        raise ValueError("broken")

    items = streamed(work)
    assert next(items) == "first"
    with pytest.raises(ValueError, match="broken"):
        next(items)


def test_closing_ends_the_work():
    emitted, ended = [], threading.Event()

    def work(emit):
        try:
            for number in range(10**9):
                emitted.append(number)
                emit(number)
        finally:
            ended.set()

    items = streamed(work)
    assert next(items) == 0
    items.close()
    assert ended.is_set()
    assert threading.active_count() < 50
    assert len(emitted) < 10**9


def test_an_exception_that_is_an_item_is_no_error():
    assert [str(item) for item in streamed(lambda emit: emit(ValueError("said")))] == ["said"]
