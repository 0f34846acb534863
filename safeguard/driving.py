"""The two drivers of a flow, one blocking and one for an event loop, and the time limits of its steps.

A flow is a generator that yields the work it wants done as `Step`s and is sent the results. So the logic is
written once, and nothing of ours ever runs on the event loop for long.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step:
    """Work that a flow wants done: `run()`, within `timeout_s` when given.

    on_loop: it only makes an awaitable.
    """

    run: Callable[[], Any]
    timeout_s: float | None = None
    on_loop: bool = False


class StepTimeout(Exception):
    """A step ran out of its time.

    Its thread is left to end by itself: a running model cannot be stopped safely.
    """


Flow = Generator[Step, Any, T]


def drive(flow: Flow[T]) -> T:
    """Run a flow here, now, and return its result."""
    try:
        step = next(flow)
        while True:
            try:
                result = step.run() if step.timeout_s is None else _timed(step)
            except Exception as exc:  # handed to the flow, which decides
                step = flow.throw(exc)
            else:
                step = flow.send(result)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        flow.close()


async def adrive(flow: Flow[T]) -> T:
    """Run a flow without holding the event loop.

    Each step gets a thread, or is awaited when it is a coroutine.

    A cancelled caller closes the flow at once; a step that is running ends by itself in its thread.
    """
    try:
        step = next(flow)
        while True:
            try:
                result = step.run() if step.on_loop else await _in_thread(step)
                if isawaitable(result):
                    result = await result
            except Exception as exc:  # handed to the flow, which decides
                step = flow.throw(exc)
            else:
                step = flow.send(result)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    finally:
        flow.close()


def _start(step: Step, done: Callable[[Any, BaseException | None], None]) -> None:
    """Run a step in a daemon thread of its own.

    One that hangs then neither starves a pool nor blocks exit.
    """
    context = contextvars.copy_context()

    def work() -> None:
        try:
            result = context.run(step.run)
        except BaseException as exc:
            done(None, exc)
        else:
            done(result, None)

    threading.Thread(target=work, name="safeguard-step", daemon=True).start()


def _timed(step: Step) -> Any:
    box: list[tuple[Any, BaseException | None]] = []
    finished = threading.Event()

    def done(result: Any, error: BaseException | None) -> None:
        box.append((result, error))
        finished.set()

    _start(step, done)
    if not finished.wait(step.timeout_s):
        raise StepTimeout
    result, error = box[0]
    if error is not None:
        raise error
    return result


async def _in_thread(step: Step) -> Any:
    import asyncio  # a sixth of our import time, and only event loops need it

    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if future.done():  # timed out or cancelled meanwhile; nobody waits for this result
            return
        if error is None:
            future.set_result(result)
        elif isinstance(error, StopIteration):  # a future cannot carry one
            future.set_exception(RuntimeError("a step raised StopIteration"))
        else:
            future.set_exception(error)

    def done(result: Any, error: BaseException | None) -> None:
        try:
            loop.call_soon_threadsafe(settle, result, error)
        except RuntimeError:  # the loop was closed before the step ended: there is nobody to tell
            return

    _start(step, done)
    try:
        return await asyncio.wait_for(future, step.timeout_s)
    except TimeoutError as exc:
        if future.cancelled():
            raise StepTimeout from exc
        raise
