"""Drivers: the same flow blocking and on an event loop, with time limits that do not kill what runs."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Generator
from typing import Any

import pytest

from safeguard.driving import MOST_IN_TURN, Lane, Step, StepTimeout, adrive, drive

Made = Generator[Step, Any, Any]


def test_result_of_each_step_is_sent_back() -> None:
    def flow() -> Made:
        one = yield Step(lambda: 1)
        two = yield Step(lambda: one + 1)
        return [one, two]

    assert drive(flow()) == asyncio.run(adrive(flow())) == [1, 2]


def test_error_of_a_step_is_raised_inside_the_flow() -> None:
    def flow() -> Made:
        try:
            yield Step(lambda: 1 / 0)
        except ZeroDivisionError:
            return "seen"

    assert drive(flow()) == asyncio.run(adrive(flow())) == "seen"


def test_error_that_the_flow_does_not_catch_reaches_the_caller() -> None:
    def flow() -> Made:
        yield Step(lambda: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        drive(flow())
    with pytest.raises(ZeroDivisionError):
        asyncio.run(adrive(flow()))


def test_timed_step_sees_the_context_of_its_caller() -> None:
    name: contextvars.ContextVar[str] = contextvars.ContextVar("name")
    name.set("caller")

    def flow() -> Made:
        return (yield Step(name.get, timeout_s=5))

    assert drive(flow()) == "caller"


def test_step_over_its_time_raises_inside_the_flow() -> None:
    gate = threading.Event()

    def flow() -> Made:
        try:
            yield Step(lambda: gate.wait(10), timeout_s=0.02)
        except StepTimeout:
            return "late"

    assert drive(flow()) == asyncio.run(adrive(flow())) == "late"
    gate.set()


def test_time_out_raised_by_a_step_itself_is_no_time_out_of_ours() -> None:
    def fail() -> None:
        raise TimeoutError("the check's own")

    def flow() -> Made:
        try:
            yield Step(fail, timeout_s=5)
        except StepTimeout:
            return "ours"
        except TimeoutError:
            return "its own"

    assert drive(flow()) == asyncio.run(adrive(flow())) == "its own"


def test_stop_iteration_of_a_step_does_not_end_the_flow_silently() -> None:
    def stop() -> None:
        raise StopIteration("surprise")

    def flow() -> Made:
        yield Step(stop)
        return "went on"

    with pytest.raises(RuntimeError):
        drive(flow())
    with pytest.raises(RuntimeError):
        asyncio.run(adrive(flow()))


def test_event_loop_goes_on_while_a_step_works() -> None:
    gate = threading.Event()

    def flow() -> Made:
        return (yield Step(lambda: gate.wait(10)))

    async def both() -> bool:
        task = asyncio.ensure_future(adrive(flow()))
        await asyncio.sleep(0.02)
        gate.set()  # only possible if the loop was not held
        return bool(await task)

    assert asyncio.run(both())


def most_at_once(lane: Lane) -> int:
    """How many of 60 steps of a lane run at once on one event loop."""
    running, most, lock = 0, 0, threading.Lock()

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        gate.wait(0.05)  # never set: long enough for all threads that may begin to have begun
        with lock:
            running -= 1

    def flow() -> Made:
        yield Step(work, lane=lane)

    async def every() -> None:
        await asyncio.gather(*(adrive(flow()) for _ in range(60)))

    gate = threading.Event()
    asyncio.run(every())
    return most


def test_steps_in_turn_never_fill_the_process_with_threads() -> None:
    assert most_at_once(Lane(in_turn=True)) <= MOST_IN_TURN


def test_other_steps_run_all_at_once() -> None:
    assert most_at_once(Lane()) > MOST_IN_TURN


def test_waiting_for_a_turn_is_no_part_of_the_time_limit() -> None:
    lane = Lane(in_turn=True)

    def flow() -> Made:  # the last one waits for longer than its limit before it begins
        yield Step(lambda: threading.Event().wait(0.4), timeout_s=0.7, lane=lane)
        return "done"

    async def every() -> list[str]:
        return list(await asyncio.gather(*(adrive(flow()) for _ in range(2 * MOST_IN_TURN + 1))))

    assert asyncio.run(every()) == ["done"] * (2 * MOST_IN_TURN + 1)


def test_a_waiter_that_is_cancelled_gives_its_turn_up() -> None:
    lane = Lane(in_turn=True)
    gate = threading.Event()

    def flow() -> Made:
        yield Step(gate.wait, lane=lane)

    def free() -> Made:
        return (yield Step(lambda: "free", lane=lane))

    async def every() -> str:
        held = [asyncio.create_task(adrive(flow())) for _ in range(MOST_IN_TURN)]
        await asyncio.sleep(0)
        for task in held:
            task.cancel()
        await asyncio.gather(*held, return_exceptions=True)
        return await adrive(free())

    try:
        assert asyncio.run(every()) == "free"
    finally:
        gate.set()
