"""MicroBatcher: callers that come while a run is going on share the next one.

There is no thread of its own and no waiting for company. The first caller of an idle system runs its own
items at once, in its own thread. Who comes meanwhile waits; when the run ends, the first of them leads the
next one and takes along as many of the others as its budgets hold. So nothing has to be started, joined or
kept alive, and a forked process begins anew, whatever the threads that it left behind were holding.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Self, TypeVar

from safeguard.errors import QueueClosed, QueueFull
from safeguard.locks import ForkLock

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class BatcherStatistics:
    """What a batcher has done: `runs` of the model for `calls` with `items` in all.

    refused: calls that were turned away. dropped: calls whose caller went away before their turn.
    """

    calls: int = 0
    items: int = 0
    runs: int = 0
    refused: int = 0
    dropped: int = 0


class _Job(Generic[T, R]):
    """One call. `to_lead` is called when it is its turn to lead a run, `to_end` when it has its results."""

    __slots__ = (
        "cost",
        "dropped",
        "error",
        "items",
        "leads",
        "queued",
        "results",
        "since",
        "to_end",
        "to_lead",
    )

    def __init__(
        self, items: Sequence[T], cost: int, to_lead: Callable[[], None], to_end: Callable[[], None]
    ) -> None:
        self.items, self.cost = items, cost
        self.to_lead, self.to_end = to_lead, to_end
        self.since = time.monotonic()
        self.results: list[R] | None = None
        self.error: BaseException | None = None
        self.leads = self.dropped = self.queued = False

    @property
    def ended(self) -> bool:
        """Whether it has its results or an error."""
        return self.results is not None or self.error is not None

    def get(self) -> list[R]:
        """Its results, or what was raised for it."""
        if self.error is not None:
            raise self.error
        if self.results is None:  # a leader always leaves one or the other
            raise RuntimeError("a run ended without results")
        return self.results


class _State(Generic[T, R]):
    """What the callers of one process share."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.changed = threading.Condition(threading.Lock())
        self.waiting: deque[_Job[T, R]] = deque()
        self.waiting_items = 0
        self.running = 0
        self.leaders: set[int] = set()  # idents of the threads that run
        self.closed = False
        self.counts = dict.fromkeys(("calls", "items", "runs", "refused", "dropped"), 0)

    @property
    def is_left_behind(self) -> bool:
        """Whether the process was forked since: those who waited here, and may hold the lock, are gone."""
        return self.pid != os.getpid()


class MicroBatcher(Generic[T, R]):
    """Calls `run` with the items of several callers at once and gives each caller its own results.

    run: a sequence of items in, as many results out, in order. lanes: runs that go on at a time, and that
    share what waits between them; a model that uses one core has as many as there are cores. max_items,
    max_cost: budgets of one run; a call that is larger still runs, by itself. cost: of one item, tokens for
    instance; 1 by default. max_queue: items that may wait; beyond it callers get QueueFull at once.
    max_wait_s: a call whose turn comes later than this gets QueueFull instead of a late answer. linger_s: how
    long a run that follows another one at once may wait for more company; after a pause nobody ever waits.

    Where a shared run raises, each call in it is run again by itself, so that an error reaches the caller
    that it belongs to and nobody else. Safe to call from several threads; `acall` is for event loops. `run`
    must not call the batcher back from a thread of its own making.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Sequence[R]],
        *,
        max_items: int = 64,
        max_cost: int | None = None,
        cost: Callable[[T], int] | None = None,
        max_queue: int = 1024,
        max_wait_s: float | None = None,
        linger_s: float = 0.0,
        lanes: int = 1,
        name: str = "model",
    ) -> None:
        if max_items < 1 or max_queue < 1 or (max_cost is not None and max_cost < 1):
            raise ValueError(
                "max_items, max_queue and max_cost must be 1 or more, "
                f"got {max_items}, {max_queue} and {max_cost}"
            )
        if lanes < 1:
            raise ValueError(f"lanes must be 1 or more, got {lanes}")
        if not 0 <= linger_s <= 1 or (max_wait_s is not None and not max_wait_s > 0):
            raise ValueError(
                f"linger_s must be in [0, 1] and max_wait_s above 0, got {linger_s} and {max_wait_s}"
            )
        self.name = name
        self._run, self._cost = run, cost
        self._max_items, self._max_cost, self._max_queue = max_items, max_cost, max_queue
        self._max_wait_s, self._linger_s, self._lanes = max_wait_s, linger_s, lanes
        self._state: _State[T, R] = _State()
        self._beginning = ForkLock()

    def __call__(self, items: Sequence[T], /) -> list[R]:
        """Results of the items, in order.

        Raises QueueFull, QueueClosed, and what `run` raises for these items.
        """
        state = self._here()
        if not items or threading.get_ident() in state.leaders:
            return self._checked(items)  # from inside a run: waiting for it would never end
        turn = threading.Event()
        job: _Job[T, R] = _Job(items, self._cost_of(items), turn.set, turn.set)
        self._enter(state, job)
        try:
            turn.wait()
        except BaseException:  # interrupted: nobody will read the results
            if not self._leave(state, job) and job.leads:
                self._pass_on(state)
            raise
        if job.leads:
            self._lead(state, job)
        return job.get()

    async def acall(self, items: Sequence[T]) -> list[R]:
        """The same for an event loop, which is never held: a thread that ends by itself leads the run.

        A cancelled caller drops out: items that no run has taken yet are not run at all.
        """
        import asyncio

        state, loop = self._here(), asyncio.get_running_loop()
        if not items:
            return []
        ended: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not ended.done():  # cancelled meanwhile
                ended.set_result(None)

        def to_end() -> None:
            try:
                loop.call_soon_threadsafe(settle)
            except RuntimeError:  # the loop was closed meanwhile: there is nobody to tell
                return

        def to_lead() -> None:
            threading.Thread(target=lead, name="safeguard-batch", daemon=True).start()

        def lead() -> None:
            try:
                self._lead(state, job)
            except BaseException as exc:  # what ends a thread must not end the loop
                job.error = RuntimeError(f"the run of {self.name!r} ended with {type(exc).__name__}")
            to_end()

        job: _Job[T, R] = _Job(items, self._cost_of(items), to_lead, to_end)
        self._enter(state, job)
        try:
            await ended
        except BaseException:
            self._leave(state, job)
            raise
        return job.get()

    @property
    def statistics(self) -> BatcherStatistics:
        """Counts since the batcher was made, or since this process was forked."""
        state = self._here()
        with state.changed:
            return BatcherStatistics(**state.counts)

    @property
    def running(self) -> int:
        """Runs that go on at this moment."""
        return self._here().running

    def close(self, *, timeout_s: float | None = None) -> bool:
        """Refuse new calls and wait for those that came before; true when all of them have their results."""
        state = self._here()
        with state.changed:
            state.closed = True
            return state.changed.wait_for(lambda: not state.running and not state.waiting, timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the queue ----------------------------------------------------------------------------

    def _here(self) -> _State[T, R]:
        """The state of this process; a fork leaves the queue, and the threads that waited in it, behind."""
        if self._state.is_left_behind:
            with self._beginning:  # one state for all threads of the child
                if self._state.is_left_behind:
                    fresh: _State[T, R] = _State()
                    fresh.closed = self._state.closed
                    self._state = fresh
        return self._state

    def _enter(self, state: _State[T, R], job: _Job[T, R]) -> None:
        """Give the job its turn at once where a lane is free, else a place in the queue."""
        with state.changed:
            if state.closed:
                raise QueueClosed(self.name)
            if state.running >= self._lanes:
                if state.waiting and state.waiting_items + len(job.items) > self._max_queue:
                    state.counts["refused"] += 1
                    raise QueueFull(
                        self.name, f"has {state.waiting_items} items waiting, of {self._max_queue} that may"
                    )
                job.queued = True
                state.waiting.append(job)
                state.waiting_items += len(job.items)
                state.changed.notify_all()
                return
            state.running += 1
            job.leads = True
        self._begin(state, job)

    def _begin(self, state: _State[T, R], job: _Job[T, R] | None) -> None:
        while job is not None:
            try:
                job.to_lead()
            except RuntimeError as exc:  # no thread can be started any more
                job.leads, job.error = False, exc
                job.to_end()
                job = self._next(state)
            else:
                return

    def _leave(self, state: _State[T, R], job: _Job[T, R]) -> bool:
        """Take a job that still waits out of the queue; false when a run has it, or it is to lead one."""
        if state.is_left_behind:
            return True
        with state.changed:
            job.dropped = True
            if job not in state.waiting:
                return False
            state.waiting.remove(job)
            state.waiting_items -= len(job.items)
            state.counts["dropped"] += 1
            state.changed.notify_all()
            return True

    def _pass_on(self, state: _State[T, R]) -> None:
        """Let the next one in the queue lead, or rest."""
        self._begin(state, self._next(state))

    def _next(self, state: _State[T, R]) -> _Job[T, R] | None:
        """Who leads next, taken out of the queue; None for nobody."""
        if state.is_left_behind:  # forked inside a run
            return None
        with state.changed:
            state.leaders.discard(threading.get_ident())
            state.running -= not state.waiting
            state.changed.notify_all()
            if not state.waiting:
                return None
            job = state.waiting.popleft()
            state.waiting_items -= len(job.items)
            job.leads = True
            return job

    # --- one run ------------------------------------------------------------------------------

    def _lead(self, state: _State[T, R], own: _Job[T, R]) -> None:
        """Run the job with those behind it, hand out results and errors, let the next one lead."""
        jobs = self._take(state, own)
        try:
            self._work(state, jobs)
        except BaseException:  # this thread is to end: the others have their turn again without it
            self._put_back(state, [job for job in jobs if job is not own and not job.ended])
            raise
        finally:
            self._pass_on(state)
            for job in [] if state.is_left_behind else jobs:
                if job is not own and job.ended:
                    job.to_end()

    def _put_back(self, state: _State[T, R], jobs: Sequence[_Job[T, R]]) -> None:
        if state.is_left_behind:
            return
        with state.changed:
            state.waiting.extendleft(reversed(jobs))
            state.waiting_items += sum(len(job.items) for job in jobs)

    def _take(self, state: _State[T, R], own: _Job[T, R]) -> list[_Job[T, R]]:
        """The jobs of the next run: the leader's own and those behind it that the budgets still hold.

        No more than its lane's share of them, so that the next lane to be free has work as well.
        """
        taken = [] if own.dropped else [own]
        with state.changed:
            state.leaders.add(threading.get_ident())
            if own.queued and self._linger_s:
                state.changed.wait_for(lambda: not self._fits([*taken, *state.waiting]), self._linger_s)
            share = -(-(state.waiting_items + len(own.items)) // self._lanes)
            while state.waiting and self._fits([*taken, state.waiting[0]]):
                if sum(len(job.items) for job in taken) >= share:
                    break
                taken.append(state.waiting.popleft())
                state.waiting_items -= len(taken[-1].items)
        return taken

    def _fits(self, jobs: Sequence[_Job[T, R]]) -> bool:
        """Whether these jobs may share a run; one alone always may."""
        if len(jobs) < 2:
            return True
        most = self._max_cost
        return sum(len(job.items) for job in jobs) <= self._max_items and (
            most is None or sum(job.cost for job in jobs) <= most
        )

    def _work(self, state: _State[T, R], jobs: Sequence[_Job[T, R]]) -> None:
        """Leave results or an error in every job."""
        for job in jobs:
            waited_s = time.monotonic() - job.since
            if job.queued and self._max_wait_s is not None and waited_s > self._max_wait_s:
                job.error = QueueFull(self.name, f"waited {waited_s:.3f} s, more than {self._max_wait_s:g} s")
        todo = [job for job in jobs if job.error is None]
        with state.changed:
            state.counts["calls"] += len(todo)
            state.counts["items"] += sum(len(job.items) for job in todo)
            state.counts["runs"] += bool(todo)
            state.counts["refused"] += len(jobs) - len(todo)
        try:
            results = self._checked([item for job in todo for item in job.items])
        except Exception as exc:
            if len(todo) == 1:
                todo[0].error = exc
                return
            for job in todo:
                self._work_alone(job)
            return
        start = 0
        for job in todo:
            job.results = results[start : start + len(job.items)]
            start += len(job.items)

    def _work_alone(self, job: _Job[T, R]) -> None:
        try:
            job.results = self._checked(job.items)
        except Exception as exc:
            job.error = exc

    def _checked(self, items: Sequence[T]) -> list[R]:
        if not items:
            return []
        results = list(self._run(items))
        if len(results) != len(items):
            raise ValueError(f"{self.name!r} gave {len(results)} results for {len(items)} items")
        return results

    def _cost_of(self, items: Sequence[T]) -> int:
        return len(items) if self._cost is None else sum(map(self._cost, items))
