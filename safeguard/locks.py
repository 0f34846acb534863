"""A lock that survives a fork."""

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
