"""The soak in small: every answer right, the loop free, no thread left, and the script says so."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from safeguard.testing import WordCheck
from tests.load import soak
from tests.load.memory import growth_percent, settled_rss


@pytest.fixture
def load() -> soak.Load:
    """The guard of the soak, with a word check in the place of the model."""
    return soak.Load(WordCheck("garden", category="toxicity"), soak.make_texts(random.Random(1)))


def jobs(load: soak.Load, checks: int) -> list[soak.Job]:
    texts = sorted({text for text, _ in load.wanted})
    return list(soak.make_jobs(texts, checks, random.Random(2)))


def test_soak_gives_every_call_its_own_answer(load: soak.Load) -> None:
    seen, _ = soak.soak_threads(load, [jobs(load, 300)], threads=16)

    assert (seen.wrong, seen.checks) == (0, 300)
    assert {"allow", "block", "redact", "error"} <= set(seen.actions)


def test_warm_up_shows_the_longest_texts_to_all_threads_in_both_ways() -> None:
    found = soak.warm_up_jobs(["a" * 5, "b", "c" * 9], threads=3)

    assert found == [soak.Job(("aaaaa", "c" * 9), False)] * 3 + [soak.Job(("aaaaa", "c" * 9), True)] * 3


def test_soak_of_an_event_loop_gives_every_call_its_own_answer(load: soak.Load) -> None:
    before = threading.enumerate()
    seen, _, times = asyncio.run(soak.soak_loop(load, [jobs(load, 300)], tasks=50))

    assert (seen.wrong, seen.checks) == (0, 300)
    assert times.lags.total()
    assert soak.threads_left(before) == []


def test_share_of_beats_came_no_later_than_its_lag() -> None:
    times = soak.LoopTimes()
    for ms in (1.0, 2.0, 3.0, 40.04):
        times.late(ms)

    assert (times.lag_ms(0.5), times.lag_ms(0.75), times.lag_ms(1.0)) == (2.0, 3.0, 40.0)
    assert soak.LoopTimes().lag_ms(0.5) == 0


def test_answer_that_differs_is_seen(load: soak.Load) -> None:
    job = next(job for job in jobs(load, 50) if not job.guarded)
    load.wanted[job.texts[0], False] += "!"
    seen = soak.Seen()

    load.run(job, seen)

    assert seen.wrong >= 1


def test_callback_that_works_on_the_loop_is_seen() -> None:
    times = soak.LoopTimes()

    async def busy() -> None:
        while times.callback_cpu_ms == 0.0:
            sum(range(200_000))
            await asyncio.sleep(0)

    with soak.timed_callbacks(times):
        asyncio.run(busy())

    assert times.callback_cpu_ms > 0.5
    assert times.callback_wall_ms >= times.callback_cpu_ms * 0.5


def test_thread_that_stays_is_named() -> None:
    go = threading.Event()
    before = threading.enumerate()
    thread = threading.Thread(target=go.wait, name="stays")
    thread.start()
    try:
        assert soak.threads_left(before, wait_s=0.1) == ["stays"]
    finally:
        go.set()
        thread.join()


def test_growth_is_that_of_a_straight_line() -> None:
    # 1000, 1010 ... 1040: 40 of 1000 from the first to the last
    assert growth_percent([1000, 1010, 1020, 1030, 1040]) == pytest.approx(4.0)
    assert growth_percent([1000, 1000, 1000, 1000]) == 0.0
    assert growth_percent([1000, 2000]) is None


def test_memory_that_is_held_is_measured() -> None:
    before = settled_rss()
    held = bytearray(b"x" * 30_000_000)

    assert settled_rss() - before > 25_000
    assert len(held) == 30_000_000


def failing(**changes: Any) -> list[str]:
    phase = {"wrong": 0, "rss_growth_percent": 0.5, "callback_cpu_ms_max": 3.0}
    results = {"threads": dict(phase), "loop": phase | changes, "threads_left": changes.get("left", [])}
    return soak.failures(results)


def test_each_promise_that_does_not_hold_is_named() -> None:
    assert failing() == []
    assert failing(wrong=2) == ["loop: 2 answers differ from the unloaded ones"]
    assert failing(rss_growth_percent=1.0) == ["loop: memory grew by 1.0 %"]
    assert failing(callback_cpu_ms_max=51.0) == ["loop: a callback took 51.0 ms of processor time"]
    assert failing(left=["stays"]) == ["threads left: stays"]


def test_script_ends_in_order_with_its_figures(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra onnx)")
    options = ["--checks", "80", "--threads", "8", "--tasks", "20", "--rounds", "2", "--texts", "30"]
    path = tmp_path / "results.json"
    command = [sys.executable, soak.__file__, *options, "--results", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)

    results = json.loads(path.read_text(encoding="utf-8"))
    assert (done.returncode, done.stderr, results["failed"]) == (0, "", [])
    assert (results["checks"], results["threads_left"]) == (80, [])
