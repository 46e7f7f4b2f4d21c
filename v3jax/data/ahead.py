"""Items of a source read ahead in order, by a thread or by processes.

Processes take seconds to start, which the first items do not wait for: until one is up, the thread
reads.
"""

import os
import threading
from collections import deque
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, Protocol

AHEAD = 4
"""Items that a thread or process holds ready."""


class Source[T](Protocol):
    """What is read; with processes it must be one that can be pickled."""

    def __getitem__(self, index: int) -> T: ...


class ReadAhead[T]:
    """The items of `source` from 0 on, without end; `close` ends whoever reads.

    What reading raises is raised where the item is taken.
    """

    def __init__(self, source: Source[T], n_processes: int = 0) -> None:
        self._source = source
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._pool: Future[ProcessPoolExecutor] | None = None
        if n_processes:
            # To start one waits until it has imported what it needs, so a thread does that.
            self._starter = ThreadPoolExecutor(1, "start-read-ahead")
            self._pool = self._starter.submit(_started, source, n_processes)
        self._held = AHEAD * max(1, n_processes)
        self._pending: deque[Future[T]] = deque()
        self._next = 0
        self._fill()

    def __iter__(self) -> "ReadAhead[T]":
        return self

    def __next__(self) -> T:
        """The next item.

        Raises:
          RuntimeError: a process that reads was killed.
        """
        try:
            future = self._pending.popleft()
            self._fill()
            return future.result()
        except BrokenProcessPool:
            raise RuntimeError(
                "data: a process that reads rows ahead died, perhaps for want of memory; "
                "--set data.workers=0 reads in a thread"
            ) from None

    def close(self) -> None:
        """Ends the thread, and the processes when they have read what they are at."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._pool is not None:
            self._pool.add_done_callback(_shut)
            self._starter.shutdown(wait=False)

    def _fill(self) -> None:
        while len(self._pending) < self._held:
            if self._pool is not None and self._pool.done():
                future = self._pool.result().submit(_item, self._next)
            else:
                future = self._thread.submit(self._source.__getitem__, self._next)
            self._pending.append(future)
            self._next += 1


def _started(source: Any, n_processes: int) -> ProcessPoolExecutor:
    spawn = get_context("spawn")  # a process with threads in it must not fork
    pool = ProcessPoolExecutor(n_processes, spawn, _take_up, (source,))
    for up in [pool.submit(_nothing) for _ in range(n_processes)]:
        up.result()
    return pool


def _shut(pool: Future[ProcessPoolExecutor]) -> None:
    if pool.exception() is None:
        pool.result().shutdown(wait=False, cancel_futures=True)


# ---- In a process that reads

_taken: Any = None


def _take_up(source: Any) -> None:
    global _taken
    _taken = source
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed ends nobody."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _nothing() -> None:
    pass


def _item(index: int) -> Any:
    return _taken[index]
