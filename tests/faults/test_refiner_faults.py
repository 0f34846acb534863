"""A refiner that fails in any way leaves the flagged prompt blocked, is noted, and the next call works."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from safeguard import Action, Blocked, Guard
from safeguard.testing import WordCheck
from safeguard.types import RefineRequest
from tests.faults.faults import is_usable
from tests.policies import echo, llm, text

Do = Callable[[Sequence[RefineRequest]], Any]


class Told:
    """A refiner that does what the test says."""

    name = "told"

    def __init__(self, do: Do) -> None:
        self._do = do

    def __call__(self, requests: Sequence[RefineRequest], /) -> Any:
        return self._do(requests)


def refining(do: Do, **parts: Any) -> Guard:
    return Guard(inputs=[WordCheck("knife")], refiner=Told(do), policy=llm("refine", **parts))


def fail(error: BaseException) -> Do:
    def do(requests: Sequence[RefineRequest]) -> Any:
        raise error

    return do


@pytest.mark.parametrize(
    ("do", "why"),
    [
        (fail(RuntimeError("secret-4711")), "failed with RuntimeError"),
        (fail(MemoryError()), "failed with MemoryError"),
        (fail(StopIteration()), "failed with StopIteration"),
        (lambda r: None, "failed with TypeError"),
        (lambda r: 5, "failed with TypeError"),
        (lambda r: (x.prompt for x in r), "failed with TypeError"),
        (lambda r: "spoon"[: len(r)], "failed with RefinerError"),
        (lambda r: [], "failed with RefinerError"),
        (lambda r: ["a spoon"] * (len(r) + 1), "failed with RefinerError"),
        (lambda r: [None] * len(r), "gave no text"),
        (lambda r: [b"a spoon"] * len(r), "gave no text"),
        (lambda r: [""] * len(r), "gave no text"),
        (lambda r: [" \n"] * len(r), "gave no text"),
    ],
)
def test_useless_refiner_blocks_the_flagged_prompt_and_is_noted(
    do: Do, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    guard = refining(do)
    with caplog.at_level("DEBUG", "safeguard"), pytest.raises(Blocked) as info:
        guard(echo)("a knife, secret-4711")

    report = info.value.report
    assert (report.action, report.failed, report.flagged) == (Action.BLOCK, False, ("bad",))
    assert report.verdicts[-1].error == why
    assert guard.stats().errors == {"told": {why: 1}}
    assert "secret-4711" not in caplog.text + str(info.value) + repr(report)
    assert is_usable(guard)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_what_ends_a_program_passes_through_a_refiner(error: type[BaseException]) -> None:
    guard = refining(fail(error()))
    with pytest.raises(error):
        guard(echo)("a knife")
    assert is_usable(guard)


def test_one_useless_text_does_not_take_its_neighbours() -> None:
    guard = refining(lambda r: [None if "odd" in x.prompt else "a spoon" for x in r])
    reports = guard.check_input(["knife", "odd knife"])
    assert [r.action for r in reports] == [Action.REFINE, Action.BLOCK]


def test_refiner_that_fails_is_no_reason_to_let_pass_where_errors_pass() -> None:
    guard = refining(fail(RuntimeError()), on_error="allow")
    with pytest.raises(Blocked):
        guard(echo)("a knife")
    assert guard.stats().let_through == 0


def test_failing_refiner_keeps_the_risk_of_what_was_asked() -> None:
    words = WordCheck("knife")
    guard = Guard(inputs=[words], refiner=Told(fail(RuntimeError())), policy=llm("refine", max_rounds=0))
    assert guard.check_input("a knife")[0].risk == 1.0
    assert guard.check_input("good")[0].risk == 0.0


def test_refiner_that_fails_after_a_result_gives_the_round_a_new_seed_only() -> None:
    answers = iter(["a knife", "a spoon"])
    guard = Guard(
        outputs=[WordCheck("knife")], refiner=Told(fail(RuntimeError())), policy=text("refine", max_rounds=1)
    )
    assert guard(lambda prompt: next(answers))("what cuts?") == "a spoon"
    stats = guard.stats()
    assert (stats.changed, stats.let_through) == (1, 0)
    assert stats.errors == {"told": {"failed with RuntimeError": 1}}
