"""A full queue before a model: refused at once, closed, counted apart, and free again afterwards."""

from __future__ import annotations

import threading

import pytest

from safeguard import CheckFailed, Guard
from safeguard.runtime.checks import BatchedCheck
from tests.faults.faults import Narrow, is_usable
from tests.policies import echo, policy


def test_call_that_finds_the_queue_full_is_refused_at_once_and_the_next_one_passes() -> None:
    model = Narrow()
    guard = Guard(inputs=[BatchedCheck(model, max_items=1, max_queue=1)], policy=policy(check_timeout_s=0.3))
    for text in ("slow", "waiting"):  # one is left in the model, one in the queue
        assert guard.check_input(text)[0].verdicts[0].error == "timed out"

    with pytest.raises(CheckFailed, match="'narrow' failed with QueueFull"):
        guard(echo)("one too many")
    model.gate.set()
    for thread in threading.enumerate():
        if thread.name == "safeguard-step":
            thread.join(10)
    assert is_usable(guard)
    stats = guard.stats()
    assert (stats.passed, stats.failed, stats.blocked) == (1, 3, 0)
    assert stats.errors == {"narrow": {"timed out": 2, "failed with QueueFull": 1}}
    assert model.most == 1


def test_time_out_before_a_queue_leaves_no_second_run_in_the_model() -> None:
    model = Narrow()
    guard = Guard(inputs=[BatchedCheck(model)], policy=policy(check_timeout_s=0.02))
    assert guard.check_input("slow")[0].verdicts[0].error == "timed out"
    assert guard.check_input("next")[0].verdicts[0].error == "timed out"
    model.gate.set()
    for thread in threading.enumerate():
        if thread.name == "safeguard-step":
            thread.join(10)
    assert is_usable(guard)
    assert model.most == 1
