"""Runs one contender in a process of its own, with any Python that has what the contender needs.

A script without imports of ours: `python worker.py FILE FACTORY OPTIONS`. FACTORY in FILE is called with the
options (JSON) and gives a callable that takes one payload. Each line in is a payload as JSON; each line out
says how many seconds the call took and, where it gave a mapping, that. Only the call is timed. What the
contender prints goes to standard error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO


def peak_mb() -> float | None:
    """Most memory that this process has held, in MB; None where the system does not say."""
    status = Path("/proc/self/status")  # ru_maxrss would count the parent's too
    if not status.exists():
        return None
    for line in status.read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    return None


def stay_offline() -> None:
    """Nothing in this process reaches the network: some contenders report their use, or look for models."""

    def refuse(*_: object, **__: object) -> Any:
        raise OSError("a benchmark stays offline")

    socket.getaddrinfo = refuse
    socket.create_connection = refuse


def load(file: str, factory: str, options: dict[str, Any]) -> Callable[[Any], Any]:
    """The contender that a factory in a file makes."""
    spec = importlib.util.spec_from_file_location("contender", file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{file} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules["contender"] = module
    spec.loader.exec_module(module)
    made: Callable[[Any], Any] = getattr(module, factory)(options)
    return made


def serve(work: Callable[[Any], Any], lines: TextIO, out: TextIO) -> None:
    """Answer every payload until there are no more; a call that raises is answered with its error."""
    for line in lines:
        payload = json.loads(line)
        prepare = getattr(work, "prepare", None)
        try:
            ready = payload if prepare is None else prepare(payload)
            start = time.perf_counter()
            found = work(ready)
            seconds = time.perf_counter() - start
        except Exception as exc:
            traceback.print_exc()
            _answer(out, {"error": f"{type(exc).__name__}: {exc}"})
            continue
        more = found if isinstance(found, dict) else {}
        _answer(out, {"seconds": seconds, "peak_mb": peak_mb(), **more})


def main() -> None:
    """Make the contender named on the command line and answer on what was standard output."""
    file, factory, options = sys.argv[1:4]
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    stay_offline()
    os.dup2(2, 1)  # a contender that prints must not break the protocol
    try:
        work = load(file, factory, json.loads(options))
    except Exception as exc:
        traceback.print_exc()
        _answer(out, {"error": f"{type(exc).__name__}: {exc}"})
        return
    _answer(out, {"about": getattr(work, "about", {}), "peak_mb": peak_mb()})
    serve(work, sys.stdin, out)


def _answer(out: TextIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


if __name__ == "__main__":
    main()
