"""Drivers: the same flow blocking and on an event loop, with time limits that do not kill what runs."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Generator
from typing import Any

import pytest

from safeguard.driving import Step, StepTimeout, adrive, drive

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
