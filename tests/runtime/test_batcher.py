from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest

from safeguard.errors import QueueClosed, QueueFull
from safeguard.runtime.batcher import BatcherStatistics, MicroBatcher


class Gate:
    """Doubles numbers; the first run stops until `open` is called, so that others can queue up behind it."""

    def __init__(self) -> None:
        self.runs: list[list[int]] = []
        self.entered, self._open = threading.Event(), threading.Event()

    def open(self) -> None:
        self._open.set()

    def __call__(self, items: Sequence[int]) -> list[int]:
        self.runs.append(list(items))
        self.entered.set()
        assert self._open.wait(30)
        if 13 in items:
            raise ValueError("thirteen")
        return [2 * i for i in items]


def queue_up(
    pool: ThreadPoolExecutor, batcher: MicroBatcher[int, int], gate: Gate, calls: Sequence[list[int]]
) -> list[Future[list[int]]]:
    """Calls of the batcher, the first of which runs and the others of which wait, in this order."""
    futures = [pool.submit(batcher, calls[0])]
    assert gate.entered.wait(30)
    for call in calls[1:]:
        before = len(batcher._state.waiting)
        futures.append(pool.submit(batcher, call))
        wait_until(batcher, partial(lambda n: len(batcher._state.waiting) == n, before + 1))
    return futures


def wait_until(batcher: MicroBatcher[int, int], holds: Callable[[], bool]) -> None:
    """Sleeps on the batcher's own condition until its queue looks so."""
    with batcher._state.changed:
        assert batcher._state.changed.wait_for(holds, 30)


def test_an_idle_batcher_runs_a_call_at_once_in_its_own_thread() -> None:
    threads: list[int] = []

    def run(items: Sequence[int]) -> list[int]:
        threads.append(threading.get_ident())
        return [2 * i for i in items]

    assert MicroBatcher(run)([1, 2]) == [2, 4]
    assert threads == [threading.get_ident()]


def test_calls_that_come_during_a_run_share_the_next_one() -> None:
    gate = Gate()
    batcher = MicroBatcher(gate)

    with ThreadPoolExecutor(4) as pool:
        futures = queue_up(pool, batcher, gate, [[1], [2], [3, 4], [5]])
        gate.open()

    assert gate.runs == [[1], [2, 3, 4, 5]]
    assert [f.result() for f in futures] == [[2], [4], [6, 8], [10]]
    assert batcher.statistics == BatcherStatistics(calls=4, items=5, runs=2)


def test_a_shared_run_holds_no_more_items_than_allowed() -> None:
    gate = Gate()
    batcher = MicroBatcher(gate, max_items=3)

    with ThreadPoolExecutor(5) as pool:
        futures = queue_up(pool, batcher, gate, [[1], [2, 3], [4], [5], [6, 7, 8, 9]])
        gate.open()

    assert gate.runs == [[1], [2, 3, 4], [5], [6, 7, 8, 9]]  # the last is too large for company, but it runs
    assert futures[4].result() == [12, 14, 16, 18]


def test_a_shared_run_stays_within_its_cost() -> None:
    gate = Gate()
    batcher = MicroBatcher(gate, max_cost=10, cost=lambda item: item)

    with ThreadPoolExecutor(4) as pool:
        queue_up(pool, batcher, gate, [[1], [4], [6], [5]])
        gate.open()

    assert gate.runs == [[1], [4, 6], [5]]


def test_with_two_lanes_two_runs_go_on_and_share_what_waits() -> None:
    gate = Gate()
    batcher = MicroBatcher(gate, lanes=2)

    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(batcher, [1])
        wait_until(batcher, lambda: batcher.running == 1)
        second = pool.submit(batcher, [2])
        wait_until(batcher, lambda: batcher.running == 2)
        rest = []
        for n in (3, 4, 5, 6):
            rest.append(pool.submit(batcher, [n]))
            wait_until(batcher, partial(lambda n: len(batcher._state.waiting) == n, n - 2))
        gate.open()

    assert sorted(gate.runs[:2]) == [[1], [2]]
    # four wait: a lane takes half of them at most, and which lane is first is left to the threads
    assert sorted(n for run in gate.runs[2:] for n in run) == [3, 4, 5, 6]
    assert max(len(run) for run in gate.runs[2:]) == 2
    assert [f.result() for f in (first, second, *rest)] == [[2], [4], [6], [8], [10], [12]]
    assert batcher.running == 0


def test_a_call_from_inside_a_run_of_either_lane_does_not_wait() -> None:
    together = threading.Barrier(2)

    def run(items: Sequence[int]) -> list[int]:
        if items[0] < 10:
            together.wait(30)
            return batcher([items[0] * 10])
        return [i + 1 for i in items]

    batcher: MicroBatcher[int, int] = MicroBatcher(run, lanes=2)
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(batcher, [[1], [2]])) == [[11], [21]]


def test_a_batcher_has_at_least_one_lane() -> None:
    with pytest.raises(ValueError, match="lanes must be 1 or more, got 0"):
        MicroBatcher(list, lanes=0)


def test_an_error_reaches_only_the_caller_that_it_belongs_to() -> None:
    gate = Gate()
    batcher = MicroBatcher(gate)

    with ThreadPoolExecutor(4) as pool:
        futures = queue_up(pool, batcher, gate, [[1], [2], [13], [3]])
        gate.open()

    assert gate.runs == [[1], [2, 13, 3], [2], [13], [3]]
    assert [futures[i].result() for i in (0, 1, 3)] == [[2], [4], [6]]
    with pytest.raises(ValueError, match="thirteen"):
        futures[2].result()


def test_after_an_error_the_batcher_serves_the_next_call() -> None:
    gate = Gate()
    gate.open()
    batcher = MicroBatcher(gate)

    with pytest.raises(ValueError, match="thirteen"):
        batcher([13])

    assert batcher([1]) == [2]


def test_what_ends_the_thread_of_a_leader_leaves_the_others_their_turn() -> None:
    gate = Gate()

    def run(items: Sequence[int]) -> list[int]:
        if 7 in items:
            raise SystemExit
        return gate(items)

    batcher = MicroBatcher(run)
    with ThreadPoolExecutor(4) as pool:
        futures = queue_up(pool, batcher, gate, [[1], [7], [2], [3]])
        gate.open()

    assert [futures[i].result() for i in (0, 2, 3)] == [[2], [4], [6]]
    assert isinstance(futures[1].exception(), SystemExit)


def test_too_few_results_are_an_error_and_nobody_gets_anothers() -> None:
    batcher: MicroBatcher[int, int] = MicroBatcher(lambda items: [0], name="lossy")

    with pytest.raises(ValueError, match="'lossy' gave 1 results for 2 items"):
        batcher([1, 2])


def test_a_full_queue_turns_a_call_away_at_once() -> None:
    gate = Gate()
    batcher = MicroBatcher(gate, max_queue=3, name="guard")

    with ThreadPoolExecutor(3) as pool:
        futures = queue_up(pool, batcher, gate, [[1], [2, 3]])
        with pytest.raises(QueueFull, match="the queue of 'guard' has 2 items waiting, of 3 that may"):
            batcher([4, 5])
        gate.open()

    assert [f.result() for f in futures] == [[2], [4, 6]]
    assert batcher.statistics.refused == 1


def test_a_call_larger_than_the_queue_waits_when_nobody_else_does() -> None:
    gate = Gate()
    batcher = MicroBatcher(gate, max_queue=1)

    with ThreadPoolExecutor(2) as pool:
        futures = queue_up(pool, batcher, gate, [[1], [2, 3]])
        gate.open()

    assert futures[1].result() == [4, 6]


def test_a_call_whose_turn_comes_too_late_is_turned_away() -> None:
    gate = Gate()
    batcher = MicroBatcher(gate, max_wait_s=1e-9)

    with ThreadPoolExecutor(2) as pool:
        futures = queue_up(pool, batcher, gate, [[1], [2]])
        gate.open()

    assert futures[0].result() == [2]  # it did not have to wait for its turn
    with pytest.raises(QueueFull, match=r"waited .* s, more than 1e-09 s"):
        futures[1].result()
    assert gate.runs == [[1]]


def test_a_run_after_another_lingers_only_until_it_is_full() -> None:
    gate = Gate()
    batcher = MicroBatcher(gate, max_items=2, linger_s=1.0)

    with ThreadPoolExecutor(3) as pool:
        futures = queue_up(pool, batcher, gate, [[1], [2], [3, 4]])
        gate.open()

    # [2] and [3, 4] are more than two items, so there was nothing to linger for
    assert gate.runs == [[1], [2], [3, 4]]
    assert [f.result() for f in futures] == [[2], [4], [6, 8]]


def test_no_items_are_no_run() -> None:
    gate = Gate()

    assert MicroBatcher(gate)([]) == []
    assert gate.runs == []


def test_a_call_from_inside_a_run_does_not_wait_for_it() -> None:
    def run(items: Sequence[int]) -> list[int]:
        return [sum(batcher([i - 1])) + i if i else 0 for i in items]

    batcher: MicroBatcher[int, int] = MicroBatcher(run)

    assert batcher([3]) == [6]  # 3 + 2 + 1


def test_after_close_calls_are_refused() -> None:
    made: MicroBatcher[int, int] = MicroBatcher(list, name="guard")
    with made as batcher:
        assert batcher([1]) == [1]

    with pytest.raises(QueueClosed, match="the queue of 'guard' was closed"):
        batcher([1])


def test_close_waits_for_the_calls_that_came_before() -> None:
    gate = Gate()
    batcher = MicroBatcher(gate)

    with ThreadPoolExecutor(3) as pool:
        futures = queue_up(pool, batcher, gate, [[1], [2]])
        assert not batcher.close(timeout_s=0)
        gate.open()
        assert batcher.close(timeout_s=30)

    assert [f.result() for f in futures] == [[2], [4]]


def test_every_one_of_many_threads_gets_its_own_results() -> None:
    batcher: MicroBatcher[int, int] = MicroBatcher(lambda items: [i * i for i in items], max_items=16)
    start = threading.Barrier(16)

    def work(worker: int) -> bool:
        start.wait(30)
        return all(batcher([n, n + 1]) == [n * n, (n + 1) ** 2] for n in range(worker, 1000, 16))

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(work, range(16)))


def test_tasks_of_an_event_loop_share_runs_and_the_loop_goes_on() -> None:
    gate = Gate()
    batcher = MicroBatcher(gate)

    async def main() -> list[list[int]]:
        tasks = [asyncio.create_task(batcher.acall([i])) for i in range(4)]
        await asyncio.to_thread(gate.entered.wait, 30)
        await asyncio.to_thread(wait_until, batcher, lambda: len(batcher._state.waiting) == 3)
        gate.open()  # reached: the loop was not held by the run
        return await asyncio.gather(*tasks)

    assert asyncio.run(main()) == [[0], [2], [4], [6]]
    assert gate.runs == [[0], [1, 2, 3]]


def test_a_cancelled_task_drops_out_before_its_turn() -> None:
    gate = Gate()
    batcher = MicroBatcher(gate)

    async def main() -> list[Any]:
        tasks = [asyncio.create_task(batcher.acall([i])) for i in range(3)]
        await asyncio.to_thread(wait_until, batcher, lambda: len(batcher._state.waiting) == 2)
        tasks[1].cancel()
        await asyncio.sleep(0)
        gate.open()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(main())

    assert (found[0], found[2]) == ([0], [4])
    assert isinstance(found[1], asyncio.CancelledError)
    assert gate.runs == [[0], [2]]
    assert batcher.statistics.dropped == 1


def test_an_error_reaches_the_task_that_it_belongs_to() -> None:
    gate = Gate()
    gate.open()
    batcher = MicroBatcher(gate)

    async def main() -> list[Any]:
        return list(await asyncio.gather(batcher.acall([13]), batcher.acall([1]), return_exceptions=True))

    found = asyncio.run(main())

    assert isinstance(found[0], ValueError)
    assert found[1] == [2]


def test_what_would_end_a_thread_does_not_end_the_loop() -> None:
    def run(items: Sequence[int]) -> list[int]:
        raise SystemExit

    batcher: MicroBatcher[int, int] = MicroBatcher(run, name="guard")

    with pytest.raises(RuntimeError, match="the run of 'guard' ended with SystemExit"):
        asyncio.run(batcher.acall([1]))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_forked_while_a_run_goes_on_begins_anew() -> None:
    gate = Gate()
    batcher = MicroBatcher(gate)

    with ThreadPoolExecutor(2) as pool:
        futures = queue_up(pool, batcher, gate, [[1], [2]])
        child = os.fork()
        if child == 0:  # neither pytest nor the pool may go on here
            gate.open()
            os._exit(0 if batcher([5]) == [10] and batcher.statistics.runs == 1 else 1)
        _, status = os.waitpid(child, 0)
        gate.open()

    assert os.waitstatus_to_exitcode(status) == 0
    assert [f.result() for f in futures] == [[2], [4]]


@pytest.mark.parametrize("options", [{"max_items": 0}, {"max_queue": 0}, {"max_cost": 0}])
def test_budgets_must_be_positive(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="max_items, max_queue and max_cost must be 1 or more"):
        MicroBatcher(lambda items: list(items), **options)


@pytest.mark.parametrize("options", [{"linger_s": 2}, {"linger_s": -1}, {"max_wait_s": 0}])
def test_waiting_times_must_make_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"linger_s must be in \[0, 1\] and max_wait_s above 0"):
        MicroBatcher(lambda items: list(items), **options)
