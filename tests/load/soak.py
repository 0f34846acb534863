"""Soak: very many guarded checks from threads and from an event loop, each compared with the unloaded answer.

`python tests/load/soak.py [--checks 100000] [--phase loop]` writes `results.json` beside itself and ends with
0 when all holds: no wrong answer, memory growth after warm-up under 1 %, nothing of ours longer than 50 ms on
the event loop, no thread left. A check is one text judged; texts of 1 to 2000 characters come alone or in
batches of up to 16, through `check_input` and through a guarded function, and some are redacted, blocked, or
make a check raise.

The loop is watched in three ways, because a beat that comes late does not say who was late.
`callback_cpu_ms` is processor time that one callback on the loop used: our own work there. `lag_ms` is how
late the beat of a task came: that, and all waiting for the interpreter lock and for a processor.
`control_lag_ms` is the same beat while as many threads run the same model without any guard: what the machine
costs without us.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import json
import logging
import os
import platform
import queue
import random
import sys
import threading
import time
from asyncio import events
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # run as a file
    sys.path.insert(0, str(ROOT))

from safeguard import Guard, Policy, Report, capture  # noqa: E402
from safeguard.checks.blocklist import Blocklist  # noqa: E402
from safeguard.checks.loading import load_check  # noqa: E402
from safeguard.testing import FailingCheck  # noqa: E402
from tests.load.memory import MACHINE, growth_percent, settled_rss  # noqa: E402

RESULTS = Path(__file__).with_name("results.json")
MOST_GROWTH_PERCENT = 1.0
MOST_ON_LOOP_MS = 50.0
STALL_S = 180
"""No answer for this long is a deadlock: all stacks are written and the process ends."""
_WARM = 0.3  # of the rounds
_BEAT_S = 0.005

_FAULTY, _SECRET, _BANNED = "faultword", "codename", "bannedword"
_WORDS = [
    "a",
    "the",
    "of",
    "bread",
    "water",
    "garden",
    "we",
    "want",
    "to",
    "know",
    "how",
    "7",
    "bake",
    "walk",
]


@dataclass
class Seen:
    """What a phase saw, shared by its threads; `lock` guards the counts."""

    wrong: int = 0
    calls: int = 0
    checks: int = 0
    actions: Counter[str] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, answers: Sequence[str], wanted: Sequence[str], actions: Sequence[str]) -> None:
        """Book one call."""
        with self.lock:
            self.calls += 1
            self.checks += len(wanted)
            self.wrong += sum(a != w for a, w in zip(answers, wanted, strict=False))
            self.wrong += abs(len(answers) - len(wanted))
            self.actions.update(actions)


@dataclass(frozen=True)
class Job:
    """A batch of texts, and whether it goes through a guarded function or `check_input`."""

    texts: tuple[str, ...]
    guarded: bool


def make_texts(rng: random.Random, count: int = 400) -> list[str]:
    """Texts of 1 to 2000 characters, most of them short."""
    texts: set[str] = set()
    while len(texts) < count:
        size = round(2000 ** (rng.random() ** 1.5))
        text = ""
        while len(text) < size:
            text += rng.choice(_WORDS) + rng.choice("    \n,.!")
        marked = rng.random()
        word = _FAULTY if marked < 0.03 else _SECRET if marked < 0.09 else _BANNED if marked < 0.19 else ""
        place = rng.randrange(size + 1)
        texts.add(f"{text[:place]} {word} {text[place:size]}" if word else text[:size])
    return sorted(texts)


def make_jobs(texts: Sequence[str], checks: int, rng: random.Random) -> Iterator[Job]:
    """Batches of 1 to 16 until so many texts were given out."""
    while checks > 0:
        size = min(checks, round(16 ** (rng.random() ** 2)))
        checks -= size
        yield Job(tuple(rng.choices(texts, k=size)), rng.random() < 0.4)


def warm_up_jobs(texts: Sequence[str], threads: int) -> list[Job]:
    """The two longest texts, in so many calls at once of each kind.

    What comes by chance would do it too, but nobody knows when: the runtime, the allocator (which has areas
    for threads that ask at the same time) and the tokenizer all keep what the busiest moment so far took.
    Memory that still grows after this moment grows with the number of calls.
    """
    longest = tuple(sorted(texts, key=len)[-2:])
    return [Job(longest, guarded) for guarded in (False, True) for _ in range(threads)]


def make_guard(model: Any) -> Guard:
    """Model and word list on both sides, with one check that raises for marked texts; secrets are cut out."""
    categories = {"secret": {"action": "redact"}}
    rules = {"threshold": 0.5, "categories": categories, "ignore": ["t2i*", "llm*"]}
    policy = Policy.from_data({"input": {"llm": rules}, "output": {"text": rules}, "on_block": "replace"})
    words = Blocklist({"secret": [_SECRET], "banned": [_BANNED]})
    faulty = FailingCheck(when=lambda text: _FAULTY in text)
    return Guard([model, words, faulty], [model, words], policy=policy, salt=b"soak")


def said(report: Report) -> str:
    """All that a report says but the time it took."""
    data = report.to_dict()
    data.pop("latency_ms")
    for verdict in data["verdicts"]:
        verdict.pop("latency_ms")
    return json.dumps(data, sort_keys=True)


class Load:
    """The guard under load, and the answers that it gave one text at a time before the load began."""

    def __init__(self, model: Any, texts: Sequence[str]) -> None:
        self.guard = make_guard(model)
        self.echo: Callable[[list[str]], list[str]] = self.guard(_echo)
        self.aecho: Any = self.guard(_aecho)
        self.wanted = {(t, g): self._answers(Job((t,), g))[0][0] for t in texts for g in (False, True)}

    def _answers(self, job: Job) -> tuple[list[str], list[str]]:
        """What came of each text, and the actions."""
        if not job.guarded:
            return _told(self.guard.check_input(list(job.texts)), None)
        with capture() as reports:
            outputs = self.echo(list(job.texts))
        return _told(reports, outputs)

    async def _aanswers(self, job: Job) -> tuple[list[str], list[str]]:
        if not job.guarded:
            return _told(await self.guard.acheck_input(list(job.texts)), None)
        with capture() as reports:
            outputs = await self.aecho(list(job.texts))
        return _told(reports, outputs)

    def run(self, job: Job, seen: Seen) -> None:
        """One job in this thread."""
        answers, actions = self._answers(job)
        seen.add(answers, [self.wanted[text, job.guarded] for text in job.texts], actions)

    async def arun(self, job: Job, seen: Seen) -> None:
        """One job in this task."""
        answers, actions = await self._aanswers(job)
        seen.add(answers, [self.wanted[text, job.guarded] for text in job.texts], actions)


def _echo(prompt: list[str]) -> list[str]:
    return list(prompt)


async def _aecho(prompt: list[str]) -> list[str]:
    await asyncio.sleep(0)
    return list(prompt)


def _told(reports: Sequence[Report], outputs: Sequence[str] | None) -> tuple[list[str], list[str]]:
    texts = outputs if outputs is not None else [""] * len(reports)
    told = [f"{said(report)} {text}" for report, text in zip(reports, texts, strict=True)]
    return told, ["error" if report.failed else report.action.value for report in reports]


class Watchdog:
    """Ends the process with all stacks when `alive` is not called for STALL_S seconds."""

    def __enter__(self) -> Watchdog:
        self.alive()
        return self

    def alive(self) -> None:
        """Something went on."""
        faulthandler.dump_traceback_later(STALL_S, exit=True)

    def __exit__(self, *error: object) -> None:
        faulthandler.cancel_dump_traceback_later()


def soak_threads(load: Load, rounds: Sequence[Sequence[Job]], threads: int) -> tuple[Seen, list[int]]:
    """All jobs from so many threads; memory is looked at between rounds, when all threads are idle."""
    seen, rss = Seen(), []
    jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def work() -> None:
        while (job := jobs.get()) is not None:
            try:
                load.run(job, seen)
                done.put(None)
            except BaseException as exc:
                done.put(exc)

    workers = [threading.Thread(target=work, name=f"soak-{i}") for i in range(threads)]
    for worker in workers:
        worker.start()
    try:
        with Watchdog() as watchdog:
            for listed in rounds:
                for job in listed:
                    jobs.put(job)
                for _ in listed:
                    error = done.get()
                    watchdog.alive()
                    if error is not None:
                        raise error
                rss.append(settled_rss())
    finally:
        for _ in workers:
            jobs.put(None)
        for worker in workers:
            worker.join(STALL_S)
    return seen, rss


@dataclass
class LoopTimes:
    """Milliseconds: how late each beat came; the longest callback on the loop by processor and by clock.

    Beats are counted by tenths of a millisecond: a list of them would grow for as long as the run lasts, by
    more than what is measured.
    """

    lags: Counter[int] = field(default_factory=Counter)
    callback_cpu_ms: float = 0.0
    callback_wall_ms: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """The figures for results.json."""
        return {
            "lag_ms_p50": self.lag_ms(0.5),
            "lag_ms_p99": self.lag_ms(0.99),
            "lag_ms_max": self.lag_ms(1.0),
            "callback_cpu_ms_max": round(self.callback_cpu_ms, 1),
            "callback_wall_ms_max": round(self.callback_wall_ms, 1),
        }

    def late(self, ms: float) -> None:
        """Note a beat."""
        self.lags[round(ms * 10)] += 1

    def lag_ms(self, share: float) -> float:
        """So late, at most, came this share of the beats; 0 without any."""
        wanted, seen = share * self.lags.total(), 0
        for tenths in sorted(self.lags):
            seen += self.lags[tenths]
            if seen >= wanted:
                return tenths / 10
        return 0.0


@contextmanager
def timed_callbacks(times: LoopTimes) -> Iterator[None]:
    """Time every callback that a loop runs, on its own thread's processor time."""
    plain = events.Handle._run

    def run(handle: Any) -> None:
        cpu, wall = time.thread_time(), time.perf_counter()
        plain(handle)
        times.callback_cpu_ms = max(times.callback_cpu_ms, (time.thread_time() - cpu) * 1e3)
        times.callback_wall_ms = max(times.callback_wall_ms, (time.perf_counter() - wall) * 1e3)

    events.Handle._run = run  # type: ignore[assignment,method-assign]  # asyncio has no hook for this
    try:
        yield
    finally:
        events.Handle._run = plain  # type: ignore[method-assign]


async def beat(times: LoopTimes) -> None:
    """Wake every 5 ms and note how late that was, until cancelled."""
    while True:
        started = time.perf_counter()
        await asyncio.sleep(_BEAT_S)
        times.late((time.perf_counter() - started - _BEAT_S) * 1e3)


async def soak_loop(
    load: Load, rounds: Sequence[Sequence[Job]], tasks: int
) -> tuple[Seen, list[int], LoopTimes]:
    """All jobs from so many tasks of one event loop."""
    seen, rss, times = Seen(), [], LoopTimes()
    with Watchdog() as watchdog, timed_callbacks(times):
        for listed in rounds:
            waiting = iter(listed)

            async def work(waiting: Iterator[Job] = waiting) -> None:
                for job in waiting:
                    await load.arun(job, seen)
                    watchdog.alive()

            heart = asyncio.create_task(beat(times))
            await asyncio.gather(*(work() for _ in range(tasks)))
            heart.cancel()
            rss.append(await asyncio.to_thread(settled_rss))  # collecting garbage is no callback of ours
    return seen, rss, times


async def control_lag(model: Any, jobs: Sequence[Job], threads: int) -> LoopTimes:
    """The beat while threads run the bare model: no guard, nothing of ours on the loop."""
    times = LoopTimes()
    waiting = iter(jobs)
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                job = next(waiting, None)
            if job is None:
                return
            model(list(job.texts))

    heart = asyncio.create_task(beat(times))
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        await asyncio.sleep(0.05)
    heart.cancel()
    return times


def threads_left(before: Collection[threading.Thread], wait_s: float = 10.0) -> list[str]:
    """Names of threads that were not there `before` and do not end by themselves."""
    until = time.monotonic() + wait_s
    while (new := set(threading.enumerate()) - set(before)) and time.monotonic() < until:
        time.sleep(0.05)
    return sorted(thread.name for thread in new)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the top of the file."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", 1)[0])
    parser.add_argument("--checks", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=32)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument(
        "--rounds", type=int, default=20, help="of each phase, between which memory is measured"
    )
    parser.add_argument("--texts", type=int, default=400, help="different ones")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--phase", choices=("threads", "loop"), help="only one; the other keeps its figures")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    faulthandler.enable()
    before = threading.enumerate()
    logging.getLogger("safeguard").setLevel(logging.CRITICAL)  # the checks that raise are meant to
    rng = random.Random(args.seed)
    texts = make_texts(rng, args.texts)
    model = load_check("text-guard-s")
    load = Load(model, texts)

    def rounds() -> list[list[Job]]:
        return [list(make_jobs(texts, args.checks // 2 // args.rounds, rng)) for _ in range(args.rounds)]

    results: dict[str, Any] = {}
    if args.phase:
        results = json.loads(args.results.read_text(encoding="utf-8"))
    warm, _ = soak_threads(load, [warm_up_jobs(texts, args.threads)], args.threads)
    if args.phase != "loop":
        started = time.monotonic()
        seen, rss = soak_threads(load, rounds(), args.threads)
        seen.wrong += warm.wrong
        results["threads"] = _figures(seen, rss, time.monotonic() - started) | {"threads": args.threads}
    if args.phase != "threads":
        some = [job for jobs in rounds()[:4] for job in jobs]
        control = asyncio.run(control_lag(model, some, args.tasks))
        started = time.monotonic()
        seen, rss, times = asyncio.run(soak_loop(load, rounds(), args.tasks))
        seen.wrong += warm.wrong
        results["loop"] = _figures(seen, rss, time.monotonic() - started) | times.to_dict()
        results["loop"] |= {f"control_{k}": v for k, v in control.to_dict().items() if k.startswith("lag")}
        results["loop"]["tasks"] = args.tasks
    results |= {
        "machine": MACHINE,
        "python": platform.python_version(),
        "model": "text-guard-s",
        "checks": sum(results[phase]["checks"] for phase in ("threads", "loop")),
        "threads_left": threads_left(before),
        "load_average": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }
    results["failed"] = failures(results)
    args.results.write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    sys.stdout.write(json.dumps(results, indent=2, sort_keys=True) + "\n")
    return 1 if results["failed"] else 0


def _figures(seen: Seen, rss: list[int], seconds: float) -> dict[str, Any]:
    warm = rss[int(len(rss) * _WARM) :]
    return {
        "calls": seen.calls,
        "checks": seen.checks,
        "wrong": seen.wrong,
        "actions": dict(sorted(seen.actions.items())),
        "seconds": round(seconds, 1),
        "rss_mb": [round(kb / 1024, 1) for kb in rss],
        "rss_growth_percent": growth_percent(warm),
    }


def failures(results: dict[str, Any]) -> list[str]:
    """What did not hold, in words; growth is judged where there are enough rounds to tell."""
    wrong = []
    for phase in ("threads", "loop"):
        figures = results[phase]
        if figures["wrong"]:
            wrong.append(f"{phase}: {figures['wrong']} answers differ from the unloaded ones")
        growth = figures["rss_growth_percent"]
        if growth is not None and growth >= MOST_GROWTH_PERCENT:
            wrong.append(f"{phase}: memory grew by {growth} %")
    if results["loop"]["callback_cpu_ms_max"] > MOST_ON_LOOP_MS:
        wrong.append(f"loop: a callback took {results['loop']['callback_cpu_ms_max']} ms of processor time")
    if results["threads_left"]:
        wrong.append(f"threads left: {', '.join(results['threads_left'])}")
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
