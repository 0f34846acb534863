"""Ways in which things go wrong: a full disk, a fork, a signal, a check that is told how to fail."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safeguard import Guard

ROOT = Path(__file__).parent.parent.parent


class Told:
    """A check that does to a batch what the test says; a text `good` is always clean."""

    def __init__(
        self, do: Callable[[Sequence[Any]], Any], *, name: str = "told", modality: str = "text"
    ) -> None:
        self.name, self.modality, self._do = name, modality, do

    def __call__(self, batch: Sequence[Any], /) -> Any:
        if list(batch) == ["good"]:
            return [{"bad": 0.0}]
        return self._do(batch)


class Narrow:
    """A check on a backend that may run once at a time: its lock is held by whoever is inside the model.

    Tells by `entered` that a run began, and counts in `most` how many were ever inside at once.
    """

    name = "narrow"
    modality = "text"

    def __init__(self) -> None:
        self.entered, self.gate = threading.Event(), threading.Event()
        self.most = self._inside = 0
        self._lock = threading.Lock()

    def __call__(self, batch: Sequence[str], /) -> list[dict[str, float]]:
        with self._lock:
            self._inside += 1
            self.most = max(self.most, self._inside)
            self.entered.set()
            if batch[0] == "slow":
                self.gate.wait(30)
            self._inside -= 1
        return [{"bad": 0.0} for _ in batch]


def is_usable(guard: Guard) -> bool:
    """Whether the next, harmless call passes."""
    (report,) = guard.check_input("good")
    return report.action.value == "allow" and not any(v.error for v in report.verdicts)


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """No file can grow beyond so many bytes; writing more is an OSError, in native code too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def in_fork(work: Callable[[], Any], *, limit_s: int = 20) -> str:
    """What `work` gives as text in a forked child, or the name of what it raises; "hung" after the limit."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is the point
        child = os.fork()
    if child == 0:
        said = b"nothing"
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(limit_s)
            try:
                said = str(work()).encode()
            except BaseException as exc:
                said = type(exc).__name__.encode()
            os.write(write, said)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    return "hung" if os.WIFSIGNALED(status) else answer


def run_script(text: str, *args: str | Path, stop: signal.Signals | None = None) -> tuple[int, str, str]:
    """Exit status, output and errors of a Python script; `stop` is sent when it prints "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", text, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    said = ""
    if stop is not None and process.stdout is not None:
        said = process.stdout.readline()
        process.send_signal(stop)
    out, errors = process.communicate(timeout=60)
    return process.returncode, said + out, errors
