"""Work that reports as it goes on, as an iterator: what a page shows piece by piece."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from typing import TypeVar

Item = TypeVar("Item")


def streamed(work: Callable[[Callable[[Item], None]], None]) -> Iterator[Item]:
    """What ``work`` emits, while it runs in a thread of its own.

    An error of the work is raised here. When the iterator is closed, the work ends at what it emits
    next.

    Args:
        work: called with a function to emit items with.
    """
    items: queue.SimpleQueue[tuple[bool, Item | BaseException | None]] = queue.SimpleQueue()
    closed = threading.Event()

    def emit(item: Item) -> None:
        if closed.is_set():
            raise CancelledError
        items.put((True, item))

    def run() -> None:
        end: BaseException | None = None
        try:
            work(emit)
        except CancelledError:  # nobody waits for the work any more
            pass
        except BaseException as error:
            end = error
        items.put((False, end))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            more, item = items.get()
            if not more:
                if isinstance(item, BaseException):
                    raise item
                return
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join()
