from __future__ import annotations

import os
import threading

import pytest

from safeguard.locks import ForkSlots


def test_only_so_many_threads_are_inside_at_once() -> None:
    slots = ForkSlots(2)
    counted = threading.Lock()
    inside = most = 0
    both_in = threading.Barrier(2, timeout=10)  # two can be inside together, or this breaks

    def work() -> None:
        nonlocal inside, most
        with slots:
            with counted:
                inside += 1
                most = max(most, inside)
            both_in.wait()
            with counted:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert (most, inside, both_in.broken) == (2, 0, False)


def test_place_is_given_back_by_one_that_raises() -> None:
    slots = ForkSlots(1)
    with pytest.raises(KeyError), slots:
        raise KeyError("inside")

    with slots:  # would wait for ever
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_all_places_are_free_in_a_forked_process() -> None:
    slots = ForkSlots(1)
    with slots:
        child = os.fork()
        if child == 0:
            threading.Timer(10, os._exit, [1]).start()
            with slots:
                os._exit(0)
        _, status = os.waitpid(child, 0)

    assert os.waitstatus_to_exitcode(status) == 0


def test_no_places_are_refused() -> None:
    with pytest.raises(ValueError, match="count must be 1 or more, got 0"):
        ForkSlots(0)
