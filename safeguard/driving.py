"""The two drivers of a flow, one blocking and one for an event loop, and the time limits of its steps.

A flow is a generator that yields the work it wants done as `Step`s and is sent the results. So the logic is
written once, and nothing of ours ever runs on the event loop for long.
"""

from __future__ import annotations

import contextvars
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Generator
from dataclasses import dataclass
from inspect import isawaitable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

MOST_STUCK = 4
"""Calls of one check or refiner that may hang at once; further ones are refused until one comes back."""


MOST_IN_TURN = min(32, (os.cpu_count() or 1) + 4)
"""Checks that run at once for one event loop: as many as its own default pool has threads."""

_turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = weakref.WeakKeyDictionary()


class Lane:
    """The steps of one check or refiner that still run though nobody waits for them any more.

    A running model cannot be stopped safely, so its thread is left to end by itself; this bounds how many
    such threads there can be. Needs no lock, so that a process forked at any moment can go on with it.

    in_turn: on an event loop only `MOST_IN_TURN` of such steps run at once, and the others wait for their
    turn outside of their time limit: hundreds of computing threads would starve the loop of the interpreter.
    """

    def __init__(self, most: int = MOST_STUCK, *, in_turn: bool = False) -> None:
        self.most, self.in_turn = most, in_turn
        self._left: dict[_Run, tuple[float, int]] = {}  # when its time is up, and in which process it runs

    @property
    def stuck(self) -> int:
        """How many were left and have outlived their time; a fork starts with none."""
        now, here = time.monotonic(), os.getpid()
        return sum(until <= now and process == here for until, process in tuple(self._left.values()))

    def leave(self, run: _Run, until: float) -> None:
        """Book a run that nobody waits for; it has time until then, on the monotonic clock."""
        self._left[run] = until, os.getpid()
        if run.ended:  # meanwhile, and it looked for its place before we made it
            self.forget(run)

    def forget(self, run: _Run) -> None:
        """The run came back."""
        self._left.pop(run, None)


@dataclass(frozen=True, slots=True)
class Step:
    """Work that a flow wants done: `run()`, within `timeout_s` when given.

    on_loop: it only makes an awaitable. lane: whose work it is; refused when too much of that hangs.
    """

    run: Callable[[], Any]
    timeout_s: float | None = None
    on_loop: bool = False
    lane: Lane | None = None


class StepTimeout(Exception):
    """A step ran out of its time.

    Its thread is left to end by itself: a running model cannot be stopped safely.
    """


class StepRefused(Exception):
    """A step was not begun, because too many of its kind hang."""


Flow = Generator[Step, Any, T]


def drive(flow: Flow[T]) -> T:
    """Run a flow here, now, and return its result."""
    try:
        step = next(flow)
        while True:
            try:
                result = step.run() if step.timeout_s is None else _timed(step)
            except Exception as exc:  # the flow decides; what ends the program passes through
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


class _Run:
    """A step in a daemon thread of its own: one that hangs neither starves a pool nor blocks exit."""

    def __init__(self, step: Step, done: Callable[[Any, BaseException | None], None]) -> None:
        """Begin it. Raises StepRefused when too many of its lane hang."""
        self._lane = step.lane or Lane()
        if self._lane.stuck >= self._lane.most:
            raise StepRefused
        self.ended = False
        self._until = math.inf if step.timeout_s is None else time.monotonic() + step.timeout_s
        context = contextvars.copy_context()

        def work() -> None:
            try:
                result = context.run(step.run)
            except BaseException as exc:  # carried to the caller, whatever it is
                self._end()
                done(None, exc)
            else:
                self._end()
                done(result, None)

        threading.Thread(target=work, name="safeguard-step", daemon=True).start()

    def _end(self) -> None:
        self.ended = True
        self._lane.forget(self)

    def leave(self) -> None:
        """Wait for it no longer."""
        if not self.ended:
            self._lane.leave(self, self._until)


def _timed(step: Step) -> Any:
    box: list[tuple[Any, BaseException | None]] = []
    finished = threading.Event()

    def done(result: Any, error: BaseException | None) -> None:
        box.append((result, error))
        finished.set()

    run = _Run(step, done)
    try:
        finished.wait(step.timeout_s)
    finally:  # also when the waiting itself is interrupted
        run.leave()
    if not box:
        raise StepTimeout
    result, error = box[0]
    if error is not None:
        raise error
    return result


async def _in_thread(step: Step) -> Any:
    import asyncio  # a sixth of our import time, and only event loops need it

    if step.lane is None or not step.lane.in_turn:
        return await _at_once(step)
    loop = asyncio.get_running_loop()
    async with _turns.setdefault(loop, asyncio.Semaphore(MOST_IN_TURN)):
        return await _at_once(step)


async def _at_once(step: Step) -> Any:
    import asyncio

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

    run = _Run(step, done)
    try:
        async with asyncio.timeout(step.timeout_s):
            return await future
    except TimeoutError as exc:
        if not future.cancelled() and future.exception() is exc:  # the step's own
            raise
        raise StepTimeout from exc
    finally:
        run.leave()
