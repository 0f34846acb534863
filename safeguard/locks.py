"""A lock and a number of places that survive a fork."""

from __future__ import annotations

import os
import threading
from types import TracebackType


class ForkLock:
    """A reentrant lock that is free in a forked process, where the thread that held it does not exist."""

    def __init__(self) -> None:
        self._locks: dict[int, threading.RLock] = {}

    def _here(self) -> threading.RLock:
        process = os.getpid()
        return self._locks.get(process) or self._locks.setdefault(process, threading.RLock())

    def __enter__(self) -> None:
        self._here().acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._here().release()


class ForkSlots:
    """So many threads at once go in, the others wait outside; all places are free in a forked process.

    A thread must not go in twice. Raises ValueError for fewer than one place.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"count must be 1 or more, got {count}")
        self.count = count
        self._places: dict[int, threading.Semaphore] = {}

    def _here(self) -> threading.Semaphore:
        process = os.getpid()
        return self._places.get(process) or self._places.setdefault(process, threading.Semaphore(self.count))

    def __enter__(self) -> None:
        self._here().acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._here().release()
