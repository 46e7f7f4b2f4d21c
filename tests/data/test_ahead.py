"""Reading ahead: in order, by whoever reads; its end and its errors."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from itertools import islice

import pytest

from v3jax.data.ahead import AHEAD, ReadAhead


class Squares:
    """Each number's square, and who computed it; the seventh item cannot be read."""

    def __getitem__(self, index: int) -> tuple[int, int]:
        if index == 7:
            raise ValueError("seven")
        return index * index, os.getpid()


class Endless(Squares):
    def __getitem__(self, index: int) -> tuple[int, int]:
        return index * index, os.getpid()


def by_others(ahead: ReadAhead[tuple[int, int]], first: int = 0) -> Iterator[int]:
    """Who read the items from `first` on that another process read; all are what they should be."""
    deadline = time.monotonic() + 120
    for number, (square, who) in enumerate(ahead, first):
        assert square == number * number
        if who != os.getpid():
            yield who
        else:
            assert time.monotonic() < deadline, "no process took over"
            time.sleep(0.01)


def test_a_thread_reads_in_order_and_its_errors_come_where_the_item_would() -> None:
    with closing(ReadAhead(Squares())) as ahead:
        assert [square for square, _ in islice(ahead, 7)] == [n * n for n in range(7)]
        with pytest.raises(ValueError, match="seven"):
            next(ahead)


def test_no_more_is_read_than_is_held() -> None:
    read = []

    class Counted:
        def __getitem__(self, index: int) -> int:
            read.append(index)
            return index

    with closing(ReadAhead(Counted())) as ahead:
        assert next(ahead) == 0
        time.sleep(0.2)
        assert len(read) <= AHEAD + 1


def test_processes_take_over_in_order_and_the_first_item_does_not_wait() -> None:
    begun = time.monotonic()
    with closing(ReadAhead(Endless(), 2)) as ahead:
        next(ahead)
        first = time.monotonic() - begun
        others = set(islice(by_others(ahead, 1), 60))
        started = time.monotonic() - begun
    assert os.getpid() not in others
    assert first < started / 3


def test_a_killed_process_is_one_line() -> None:
    with closing(ReadAhead(Endless(), 1)) as ahead:
        who = next(by_others(ahead))
        os.kill(who, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"a process that reads rows ahead died.*workers=0"):
            deque(islice(ahead, 10_000), 0)


_PARENT = """
import os, sys, time
from tests.data.test_ahead import Endless, by_others
from v3jax.data.ahead import ReadAhead

if __name__ == "__main__":
    print(next(by_others(ReadAhead(Endless(), 1))), flush=True)
    time.sleep(600)
"""


def test_processes_end_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        reader = int(parent.stdout.readline())
        os.kill(reader, 0)  # it is there
        parent.kill()
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                os.kill(reader, 0)
            except ProcessLookupError:
                return
            time.sleep(0.05)
    pytest.fail("the process that reads is still there")
