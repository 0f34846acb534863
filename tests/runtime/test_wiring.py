from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from safeguard.guards import Guard
from safeguard.policy import Policy, RuntimeRules
from safeguard.runtime.checks import BatchedCheck, CachedCheck
from safeguard.runtime.wiring import Runtime
from safeguard.testing import BrightCheck, FailingCheck, WordCheck
from safeguard.types import Action, Finding

ALWAYS = Policy(runtime=RuntimeRules(batching="always"))
CACHED = Policy(runtime=RuntimeRules(cache_entries=10))


class Model(WordCheck):
    """A word check that says which model it is."""

    digest = "d" * 64


def test_by_default_a_check_on_the_cpu_stays_as_it_is() -> None:
    check = Model()

    assert Runtime(Policy(), "cpu").wrap(check) is check


def test_by_default_a_model_on_a_gpu_shares_its_runs() -> None:
    assert isinstance(Runtime(Policy(), "cuda").wrap(Model()), BatchedCheck)


def test_by_default_a_check_without_a_model_never_waits() -> None:
    check = WordCheck()

    assert Runtime(Policy(), "cuda").wrap(check) is check


def test_batching_can_be_had_everywhere_and_nowhere() -> None:
    check = WordCheck()

    assert isinstance(Runtime(ALWAYS, "cpu").wrap(check), BatchedCheck)
    assert Runtime(Policy(runtime=RuntimeRules(batching="never")), "cuda").wrap(check) is check


def test_a_check_is_wrapped_once() -> None:
    runtime, check = Runtime(ALWAYS, "cpu"), WordCheck()

    assert runtime.wrap(check) is runtime.wrap(check)


def test_texts_are_cached_and_pictures_are_not() -> None:
    runtime, bright = Runtime(CACHED, "cpu"), BrightCheck()

    assert isinstance(runtime.wrap(WordCheck()), CachedCheck)
    assert runtime.wrap(bright) is bright


def test_a_guard_with_a_cache_asks_once_and_counts() -> None:
    check = WordCheck("rude")
    guard = Guard(inputs=[check], policy=CACHED)

    first, second = guard.check_input("a rude day")[0], guard.check_input("a rude day")[0]

    assert first.action is second.action is Action.BLOCK
    assert first.spans == second.spans
    assert check.seen == ["a rude day"]
    statistics = guard.cache_statistics()
    assert statistics is not None
    assert (statistics.hits, statistics.misses) == (1, 1)


def test_a_guard_without_a_cache_has_no_counts() -> None:
    guard = Guard(inputs=[WordCheck()])
    guard.check_input("a day")

    assert guard.cache_statistics() is None


def test_a_guard_with_batching_gives_each_thread_the_report_on_its_own_text() -> None:
    guard = Guard(inputs=[WordCheck("rude")], policy=ALWAYS)
    start = threading.Barrier(8)

    def work(worker: int) -> list[bool]:
        start.wait(30)
        return [
            guard.check_input(f"{'rude' if (worker + n) % 3 == 0 else 'good'} {n}")[0].blocked
            for n in range(20)
        ]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))

    assert found == [[(worker + n) % 3 == 0 for n in range(20)] for worker in range(8)]


def test_a_full_queue_is_closed_like_any_failure() -> None:
    entered, release = threading.Event(), threading.Event()

    class Slow(WordCheck):
        def __call__(self, batch: Sequence[str], /) -> list[Finding]:
            entered.set()
            assert release.wait(30)
            return super().__call__(batch)

    policy = Policy(runtime=RuntimeRules(batching="always", max_queue=1))
    guard = Guard(inputs=[Slow()], policy=policy)
    wrapped = guard.route("llm", "text").inputs.checks[0]
    assert isinstance(wrapped, BatchedCheck)
    state = wrapped.batcher._state
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(guard.check_input, "a")
        assert entered.wait(30)
        waiting = pool.submit(guard.check_input, "b")
        with state.changed:
            assert state.changed.wait_for(lambda: bool(state.waiting), 30)
        (refused,) = guard.check_input("c")
        release.set()

    assert refused.blocked
    assert refused.failed
    assert refused.verdicts[0].error == "failed with QueueFull"
    assert [f.result()[0].blocked for f in (running, waiting)] == [False, False]


def test_warming_up_reaches_every_check_of_the_guard() -> None:
    check, bright = WordCheck(), BrightCheck()
    guard = Guard(inputs=[check], outputs=[bright])

    guard.warmup()

    assert check.seen == ["a"]


def test_a_check_that_cannot_be_warmed_up_says_so() -> None:
    with pytest.raises(RuntimeError, match="device lost"):
        Guard(inputs=[FailingCheck()]).warmup()


def test_checks_of_one_call_share_their_tokens() -> None:
    memos: list[object] = []

    class Keeps(WordCheck):
        def __call__(self, batch: Sequence[str], /) -> list[Finding]:
            memos.append(getattr(batch, "memo", None))
            return super().__call__(batch)

    guard = Guard(inputs=[Keeps(name="one"), Keeps(name="two")])
    guard.check_input("a day")
    guard.check_input("a day")

    assert memos[0] is memos[1] is not None
    assert memos[2] is not memos[0]
