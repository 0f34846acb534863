"""The parent's side of `worker.py`: contenders in processes of their own, asked one at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from safeguard.bench.timing import ContenderFailed, Sample

HERE = Path(__file__).parent
OURS, PEERS = HERE / "ours.py", HERE / "peers.py"
_PATIENCE_S = 600.0
_UNTRACKED = {  # the peers' own switches for reports of their use, which would be timed as well
    "DO_NOT_TRACK": "1",
    "NEMO_GUARDRAILS_NO_USAGE_STATS": "1",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
    "OTEL_SDK_DISABLED": "true",
}
_LAST_WORDS = 400  # characters of standard error that an error quotes


@dataclass(frozen=True)
class Start:
    """How a contender is started. python: an interpreter that has what it needs, by default this one.

    note: what it is and what of it is real, for the report.
    """

    name: str
    file: Path
    factory: str
    options: dict[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    note: str = ""


class Worker:
    """A contender in its own process; ContenderFailed when it does not start, dies or does not answer."""

    def __init__(self, start: Start, *, log: Path, patience_s: float = _PATIENCE_S) -> None:
        self.start, self._log, self._patience_s = start, log, patience_s
        command = [start.python, "-P", str(HERE / "worker.py"), str(start.file), start.factory]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [*command, json.dumps(start.options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=_environment(ours=start.file == OURS),
                text=True,
                encoding="utf-8",
            )
        self.about: dict[str, Any] = {}
        self.peak_mb: float | None = None

    def wait(self) -> None:
        """Until it is loaded. Several may load at once; they are not timed then."""
        loaded = self._answer()
        self.about, self.peak_mb = loaded["about"], loaded["peak_mb"]

    def __call__(self, payload: Any, items: int = 1) -> Sample:
        """One timed run of the contender in its process."""
        pipe: IO[str] | None = self._process.stdin
        try:
            if pipe is None:
                raise OSError("no pipe")
            pipe.write(json.dumps(payload) + "\n")
            pipe.flush()
        except OSError as exc:
            raise ContenderFailed(self.start.name, self._last_words() or str(exc)) from exc
        answer = self._answer()
        seconds = float(answer.pop("seconds"))
        self.peak_mb = answer.pop("peak_mb", None)
        return Sample(seconds, items, answer)

    def close(self) -> None:
        """End the process; one that does not end by itself is killed."""
        if self._process.stdin is not None:
            with suppress(OSError):  # it is gone already
                self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        if self._process.stdout is None:
            raise ContenderFailed(self.start.name, "no pipe")
        alarm = threading.Timer(self._patience_s, self._process.kill)
        alarm.start()
        try:
            line = self._process.stdout.readline()
        finally:
            alarm.cancel()
        if not line:
            raise ContenderFailed(self.start.name, f"the process ended: {self._last_words()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise ContenderFailed(self.start.name, str(answer["error"]))
        return answer

    def _last_words(self) -> str:
        text = self._log.read_text(encoding="utf-8", errors="replace").strip()
        return text[-_LAST_WORDS:]


@contextmanager
def workers(
    starts: list[Start], logs: Path, *, say: Callable[[str], None] = lambda _: None
) -> Iterator[tuple[dict[str, Worker], dict[str, str]]]:
    """The contenders that could be started, and for each of the others the reason."""
    logs.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        running: dict[str, Worker] = {}
        failed: dict[str, str] = {}
        for start in starts:
            log = logs / f"{start.name.replace(' ', '-').replace('/', '-')}.log"
            try:
                running[start.name] = stack.enter_context(Worker(start, log=log))
            except OSError as exc:
                failed[start.name] = str(exc)
        for name, worker in list(running.items()):
            say(f"starting {name}")
            try:
                worker.wait()
            except ContenderFailed as exc:
                failed[name] = exc.reason
                del running[name]
        yield running, failed


def _environment(*, ours: bool) -> dict[str, str]:
    found = dict(os.environ)
    found |= {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8", **_UNTRACKED}
    found.pop("PYTHONPATH", None)
    if ours:  # the package that is running, installed or not
        found["PYTHONPATH"] = str(HERE.parent.parent)
    return found
