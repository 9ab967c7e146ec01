"""Batches made ready while the last one is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch.profiler import record_function


class Prefetcher:
    """An iterator over ``batches``, which do not end; the first is begun at once.

    Args:
        batches: depend neither on what is learned nor on random draws, so that it makes no
            difference when they are made.
        ahead: whether a thread makes the next batch while the last one is used. On a CUDA device
            the kernels that make it are queued behind those of the step all the same.
    """

    def __init__(self, batches: Iterator[Any], ahead: bool) -> None:
        self._batches = batches
        self._pool = ThreadPoolExecutor(1) if ahead else None
        self._pending = None if self._pool is None else self._submit(self._pool)

    def _submit(self, pool: ThreadPoolExecutor) -> Future[Any]:
        return pool.submit(next, self._batches)

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Any:
        with record_function("data wait"):
            if self._pool is None or self._pending is None:
                return next(self._batches)
            ready = self._pending.result()
            self._pending = self._submit(self._pool)
            return ready

    def close(self) -> None:
        """End the thread, where there is one."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
