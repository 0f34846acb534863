"""Time-outs: closed, never two runs in a model that takes one, and no more stuck threads than a few."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator, Sequence
from typing import Any

import pytest

from safeguard import CheckFailed, CheckTimeout, Guard, capture
from safeguard.driving import MOST_STUCK, Lane, Step, StepRefused, StepTimeout, adrive, drive
from safeguard.testing import HangingCheck, SwapRefiner, WordCheck
from tests.faults.faults import Narrow, Told, is_usable
from tests.policies import echo, llm, policy

SOON = policy(check_timeout_s=0.02)


def threads() -> int:
    return sum(t.name == "safeguard-step" for t in threading.enumerate())


class Stuck:
    """Hangs on everything but `good` until it is released, and counts its calls."""

    name = "stuck"
    modality = "text"

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.calls = 0
        self._back = threading.Semaphore(0)

    def __call__(self, batch: Sequence[str], /) -> list[dict[str, float]]:
        if list(batch) != ["good"]:
            self.calls += 1
            self.gate.wait(30)
        return [{"bad": 0.0} for _ in batch]


def release(check: Stuck | HangingCheck) -> None:
    """Let the threads of earlier calls end, and wait for them."""
    check.gate.set() if isinstance(check, Stuck) else check.release()
    for thread in threading.enumerate():
        if thread.name == "safeguard-step":
            thread.join(10)


def test_hang_is_counted_apart_and_leaves_the_guard_usable(caplog: pytest.LogCaptureFixture) -> None:
    check = Stuck()
    guard = Guard(inputs=[check], policy=SOON)
    with capture() as reports, pytest.raises(CheckTimeout, match="'stuck' timed out"):
        guard(echo)("secret-4711")
    assert (reports[0].failed, guard.stats().errors) == (True, {"stuck": {"timed out": 1}})
    assert "secret-4711" not in caplog.text
    assert is_usable(guard)
    release(check)


def test_calls_beyond_a_few_that_hang_are_refused_at_once_without_a_thread() -> None:
    check = Stuck()
    guard = Guard(inputs=[check], policy=SOON)
    reports = [guard.check_input(f"text {n}")[0] for n in range(MOST_STUCK + 3)]

    assert (check.calls, threads()) == (MOST_STUCK, MOST_STUCK)
    assert [r.verdicts[0].error for r in reports[MOST_STUCK - 1 :]] == [
        "timed out",
        *["was not asked: too many calls of it hang"] * 3,
    ]
    with pytest.raises(CheckTimeout, match="'stuck' was not asked: too many calls of it hang"):
        guard(echo)("text")
    release(check)
    assert is_usable(guard)


def test_calls_that_hang_are_bounded_on_an_event_loop_too() -> None:
    check = Stuck()
    guard = Guard(inputs=[check], policy=SOON)

    async def many() -> list[str | None]:
        found = []
        for n in range(MOST_STUCK + 1):
            (report,) = await guard.acheck_input(f"text {n}")
            found.append(report.verdicts[0].error)
        return found

    assert asyncio.run(many())[-1] == "was not asked: too many calls of it hang"
    assert check.calls == MOST_STUCK
    release(check)
    assert is_usable(guard)


def test_a_check_that_hangs_does_not_stop_another() -> None:
    stuck, words = Stuck(), WordCheck("knife")
    guard = Guard(inputs=[stuck, words], policy=SOON)
    for _ in range(MOST_STUCK + 1):
        (report,) = guard.check_input("a knife")
    assert [v.error for v in report.verdicts] == ["was not asked: too many calls of it hang", None]
    assert report.flagged == ("bad",)
    release(stuck)


def test_a_time_out_does_not_let_a_second_run_into_the_model() -> None:
    check = Narrow()
    guard = Guard(inputs=[check], policy=SOON)
    assert guard.check_input("slow")[0].verdicts[0].error == "timed out"
    assert guard.check_input("next")[0].verdicts[0].error == "timed out"  # it waited for the one inside
    check.gate.set()
    for thread in threading.enumerate():
        if thread.name == "safeguard-step":
            thread.join(10)

    assert is_usable(guard)
    assert check.most == 1


def test_batch_of_a_check_that_hangs_is_not_tried_item_by_item() -> None:
    check = Stuck()
    guard = Guard(inputs=[check], policy=SOON)
    assert [r.failed for r in guard.check_input(["a", "b", "c"])] == [True, True, True]
    assert check.calls == 1
    release(check)


def test_refiner_that_hangs_is_bounded_as_a_check_is() -> None:
    gate = threading.Event()

    class Slow(SwapRefiner):
        def __call__(self, requests: Any, /) -> list[str]:
            gate.wait(30)
            return super().__call__(requests)

    guard = Guard(
        inputs=[WordCheck("knife")],
        refiner=Slow({"knife": "spoon"}),
        policy=llm("refine", check_timeout_s=0.02),
    )
    reports = [guard.check_input(f"knife {n}")[0] for n in range(MOST_STUCK + 1)]
    assert all(r.blocked and r.flagged == ("bad",) for r in reports)
    assert guard.stats().errors == {
        "swap": {"timed out": MOST_STUCK, "was not asked: too many calls of it hang": 1}
    }
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "safeguard-step":
            thread.join(10)
    assert guard.check_input("a knife")[0].revised_prompt == "a spoon"


# --- the driver -------------------------------------------------------------------------------


def once(step: Step) -> Generator[Step, Any, Any]:
    try:
        return (yield step)
    except (StepTimeout, StepRefused) as exc:
        return type(exc).__name__


def test_thread_that_came_back_makes_room_again() -> None:
    lane, gate, back = Lane(most=1), threading.Event(), threading.Event()

    def work() -> None:
        gate.wait(10)

    assert drive(once(Step(work, 0.01, lane=lane))) == "StepTimeout"
    assert (lane.stuck, drive(once(Step(back.set, 5, lane=lane)))) == (1, "StepRefused")
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "safeguard-step":
            thread.join(10)
    assert lane.stuck == 0
    assert drive(once(Step(lambda: "done", 5, lane=lane))) == "done"
    assert not back.is_set()


def test_cancelled_step_within_its_time_is_not_stuck() -> None:
    lane, gate, entered = Lane(most=1), threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        gate.wait(10)

    async def cancel() -> str:
        task = asyncio.ensure_future(adrive(once(Step(work, 30, lane=lane))))
        await asyncio.to_thread(entered.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return str(await adrive(once(Step(lambda: "next", 5, lane=lane))))

    assert asyncio.run(cancel()) == "next"
    assert lane.stuck == 0
    gate.set()


def test_interrupted_waiting_leaves_the_thread_booked() -> None:
    lane, gate = Lane(most=1), threading.Event()
    with pytest.raises(KeyboardInterrupt):
        _interrupted_in(lambda: drive(once(Step(lambda: gate.wait(10), 1.0, lane=lane))))
    gate.wait(1.1)  # its time runs out, while it is still inside
    assert lane.stuck == 1
    gate.set()


def _interrupted_in(work: Any) -> None:
    """Run `work` and interrupt it as Ctrl-C does."""
    import signal

    signal.setitimer(signal.ITIMER_REAL, 0.05)
    before = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    try:
        work()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_run_that_ends_while_it_is_booked_is_not_booked() -> None:
    class Ended:
        ended = True

    lane = Lane()
    lane.leave(Ended(), 0.0)  # type: ignore[arg-type]
    assert lane.stuck == 0


def test_own_time_out_of_a_coroutine_step_is_no_time_out_of_ours() -> None:
    async def fail() -> None:
        raise TimeoutError("its own")

    def flow() -> Generator[Step, Any, str]:
        try:
            yield Step(fail, on_loop=True)
        except TimeoutError as exc:
            return str(exc)
        return "nothing"

    assert asyncio.run(adrive(flow())) == "its own"


def test_step_that_ends_after_its_loop_was_closed_disturbs_nobody() -> None:
    gate, entered = threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        gate.wait(10)

    async def leave() -> str:
        return str(await adrive(once(Step(work, 0.02))))

    assert asyncio.run(leave()) == "StepTimeout"
    gate.set()
    for thread in threading.enumerate():
        if thread.name == "safeguard-step":
            thread.join(10)
    assert threads() == 0


def test_all_time_spent_is_a_time_out_not_a_pass() -> None:
    gate = threading.Event()
    guard = Guard(
        inputs=[Told(lambda b: gate.wait(30)), WordCheck("knife")],
        policy=policy(total_timeout_s=0.02),
    )
    with pytest.raises(CheckFailed):
        guard(echo)("a spoon")
    gate.set()
