"""A process forked after everything was loaded and used: guarded calls work or raise, and never hang."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from safeguard import Guard
from safeguard.driving import MOST_STUCK
from safeguard.locks import ForkLock
from safeguard.runtime.batcher import MicroBatcher
from safeguard.testing import HangingCheck, WordCheck
from tests.faults.faults import in_fork
from tests.policies import policy
from tests.tiny_packs import rude_pack

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")


def text_guard(folder: Path) -> Guard:
    return Guard(policy=policy(input={"llm": {"checks": [str(folder)]}}, check_timeout_s=15))


def test_text_pack_that_ran_before_the_fork_runs_after_it(tmp_path: Path) -> None:
    guard = text_guard(rude_pack(tmp_path / "pack"))
    assert guard.check_input("rude")[0].flagged == ("toxic",)

    assert in_fork(lambda: guard.check_input(["rude", "good day"])[0].flagged) == "('toxic',)"
    assert in_fork(lambda: guard.check_input("good day")[0].flagged) == "()"
    assert guard.check_input("good day")[0].flagged == ()


def test_many_windows_side_by_side_run_after_a_fork(tmp_path: Path) -> None:
    from safeguard.checks.text_classifier import TextClassifier
    from safeguard.packs import read_pack, seal

    folder = rude_pack(tmp_path / "pack")
    fields = read_pack(folder).manifest.model_dump(mode="json", exclude={"files"})
    seal(folder, fields | {"precision": "int8-dynamic"})  # so that windows run side by side, in a thread pool
    guard = Guard(inputs=[TextClassifier.load(folder, threads=4)], policy=policy(check_timeout_s=15))
    long = "good day " * 200 + "rude"
    assert guard.check_input(long)[0].flagged == ("toxic",)

    assert in_fork(lambda: guard.check_input([long, "good"])[0].flagged) == "('toxic',)"


def test_event_loop_of_the_child_can_call_the_guard(tmp_path: Path) -> None:
    guard = text_guard(rude_pack(tmp_path / "pack"))
    asyncio.run(guard.acheck_input("good"))

    assert in_fork(lambda: asyncio.run(guard.acheck_input("rude"))[0].flagged) == "('toxic',)"


def test_lock_that_another_thread_holds_is_free_in_the_child() -> None:
    lock, entered, gate = ForkLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:  # as a thread does that is loading a model
            entered.set()
            gate.wait(20)

    def child() -> str:
        with lock:
            return "free"

    thread = threading.Thread(target=hold)
    thread.start()
    entered.wait(10)
    assert in_fork(child) == "free"
    gate.set()
    thread.join()


def test_calls_that_hang_in_the_parent_do_not_count_in_the_child() -> None:
    check = HangingCheck()
    guard = Guard(inputs=[check], policy=policy(check_timeout_s=0.02))
    for n in range(MOST_STUCK):
        guard.check_input(f"text {n}")
    assert guard.check_input("more")[0].verdicts[0].error == "was not asked: too many calls of it hang"

    assert in_fork(lambda: guard.check_input("good")[0].verdicts[0].error) == "timed out"
    check.release()


def test_torch_module_refuses_to_run_in_a_forked_process() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from safeguard.backends.torch import ModuleBackend

    module = torch.nn.Linear(4, 2)
    backend = ModuleBackend(module, inputs=["input"], outputs=["y"])
    inputs = {"input": np.ones((1, 4), np.float32)}
    backend(inputs)

    assert in_fork(lambda: backend(inputs)) == "BackendError"
    assert in_fork(lambda: _message(lambda: backend(inputs))).endswith(
        "torch hangs then; load it in the process that runs it"
    )
    assert backend(inputs)["y"].shape == (1, 2)


def _message(work: object) -> str:
    try:
        work()  # type: ignore[operator]
    except Exception as exc:
        return str(exc)
    return "nothing raised"


def test_counts_go_on_in_the_child_by_themselves() -> None:
    guard = Guard(inputs=[WordCheck("knife")])
    guard.check_input("a")

    def child() -> int:
        guard.check_input("b")
        return guard.stats().total

    assert in_fork(child) == "2"
    assert guard.stats().total == 1


def test_lock_keeps_others_out_within_a_process() -> None:
    lock, order, entered = ForkLock(), [], threading.Event()

    def second() -> None:
        entered.set()
        with lock:
            order.append("second")

    with lock, lock:  # reentrant
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


class Slow(list[str]):
    """Texts whose length takes until `gate` opens when it is asked for while they are put into a queue.

    The queue counts them under its lock, so a thread with these holds it for as long.
    """

    def __init__(self, texts: list[str]) -> None:
        super().__init__(texts)
        self.asked, self.gate = threading.Event(), threading.Event()
        self.times = 0

    def __len__(self) -> int:
        self.times += 1
        if self.times > 2:  # the first two are before the lock: whether there are any, and their cost
            self.asked.set()
            self.gate.wait(20)
        return super().__len__()


def test_queue_whose_lock_another_thread_holds_is_free_in_the_child() -> None:
    running, done = threading.Event(), threading.Event()

    def run(texts: Sequence[str]) -> list[int]:
        if texts[0] == "long":
            running.set()
            done.wait(20)
        return [len(text) for text in texts]

    batcher: MicroBatcher[str, int] = MicroBatcher(run)
    slow = Slow(["waits"])
    threads = [threading.Thread(target=batcher, args=(texts,)) for texts in (["long"], slow)]
    threads[0].start()
    running.wait(10)
    threads[1].start()
    assert slow.asked.wait(10)  # it is in the queue now, with the lock

    assert in_fork(lambda: batcher(["abc"])) == "[3]"
    assert in_fork(lambda: batcher.statistics.runs) == "0"
    slow.gate.set()
    done.set()
    for thread in threads:
        thread.join(10)


def test_run_that_forks_while_another_thread_holds_the_queue_ends_in_the_child() -> None:
    running, go = threading.Event(), threading.Event()
    said: list[str] = []
    read, write = os.pipe()

    def run(texts: Sequence[str]) -> list[int]:
        if texts[0] == "forks":
            running.set()
            go.wait(20)
            child = _forked()
            if child:
                said.append(str(os.waitpid(child, 0)[1]))
                slow.gate.set()
        return [len(text) for text in texts]

    batcher: MicroBatcher[str, int] = MicroBatcher(run)
    slow = Slow(["waits"])

    def lead() -> None:
        here = os.getpid()
        found = batcher(["forks"])  # returns twice
        if os.getpid() != here:
            os.write(write, f"{found} {batcher(['ab', 'c'])}".encode())
            os._exit(0)

    threads = [threading.Thread(target=lead), threading.Thread(target=batcher, args=(slow,))]
    threads[0].start()
    running.wait(10)
    threads[1].start()
    assert slow.asked.wait(10)
    go.set()
    for thread in threads:
        thread.join(30)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        assert pipe.read().decode() == "[5] [2, 1]"
    assert said == ["0"]  # it ended by itself, and not by the alarm


def _forked() -> int:
    """Forks; an alarm ends the child if it hangs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is the point
        child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
    return child
