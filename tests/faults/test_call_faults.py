"""What goes wrong around the checks: the generator, reading outputs, redaction, sinks of reports and logs."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import pytest

from safeguard import Action, Blocked, Guard, Report, UnseenInput, capture
from safeguard.calls import Ask, Outcome, Texts
from safeguard.driving import adrive, drive
from safeguard.flow import run
from safeguard.judging import Piece, text_piece
from safeguard.policy import Policy
from safeguard.testing import FailingCheck, HangingCheck, SwapRefiner, WordCheck
from safeguard.types import Modality, Span, Task
from tests.faults.faults import is_usable
from tests.policies import echo, llm, policy, text


def words(**parts: Any) -> Guard:
    return Guard(inputs=[WordCheck("knife")], outputs=[WordCheck("knife")], **parts)


# --- the generator ----------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError("theirs"), KeyboardInterrupt(), StopIteration("theirs")])
def test_error_of_the_generator_is_handed_on_as_it_is(error: BaseException) -> None:
    guard = words()

    @guard
    def reply(prompt: str) -> str:
        if prompt != "good":
            raise error
        return prompt

    with pytest.raises((type(error), RuntimeError)):
        reply("anything")
    assert (reply("good"), guard.stats().failed) == ("good", 0)


def test_error_of_an_asynchronous_generator_is_handed_on_as_it_is() -> None:
    guard = words()

    @guard
    async def reply(prompt: str) -> str:
        if prompt != "good":
            raise LookupError("theirs")
        return prompt

    with pytest.raises(LookupError, match="theirs"):
        asyncio.run(reply("anything"))
    assert asyncio.run(reply("good")) == "good"


def test_generator_that_fails_in_a_later_round_releases_nothing() -> None:
    guard = Guard(outputs=[WordCheck("knife")], policy=text("regenerate"))
    answers: Iterator[Any] = iter(["a knife"])
    with pytest.raises(RuntimeError):
        guard(lambda prompt: next(answers))("anything")
    assert guard(echo)("good") == "good"


def test_stream_whose_source_fails_releases_nothing_more_and_is_reported() -> None:
    guard = Guard(outputs=[WordCheck("knife")])

    def source() -> Iterator[str]:
        yield "some words "
        raise OSError("upstream lost")

    got: list[str] = []
    with capture() as reports, pytest.raises(OSError, match="upstream lost"):
        got += guard.stream(source())
    assert (got, len(reports)) == ([], 1)
    assert "".join(guard.stream(iter(["a ", "spoon"]))) == "a spoon"


def test_stream_whose_check_fails_is_stopped() -> None:
    guard = Guard(outputs=[FailingCheck(when=lambda t: "odd" in t)])
    got: list[str] = []
    with pytest.raises(Exception, match="'failing' failed with RuntimeError"):
        got += guard.stream(iter(["odd ", "words"]))
    assert got == []
    assert guard.stats().failed == 1
    assert "".join(guard.stream(iter(["a ", "spoon"]))) == "a spoon"


def test_asynchronous_stream_that_is_cancelled_closes_its_source() -> None:
    closed: list[bool] = []
    guard = Guard(outputs=[WordCheck("knife")])

    async def source() -> AsyncIterator[str]:
        try:
            yield "some words "
            await asyncio.Event().wait()
        finally:
            closed.append(True)

    async def read() -> list[str]:
        return [chunk async for chunk in guard.astream(source())]

    async def cancel() -> None:
        task = asyncio.ensure_future(read())
        for _ in range(20):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert closed == [True]
    assert "".join(guard.stream(iter(["a ", "spoon"]))) == "a spoon"


# --- outputs that cannot be read, placed or redacted --------------------------------------------


class Texted:
    """A job of texts that can be told to fail where an adapter may."""

    task: Task = "llm"
    modality: Modality = "text"
    on_loop = False

    def __init__(self, prompts: list[str], fails: str = "") -> None:
        self.asks = [Ask({"prompt": prompt}) for prompt in prompts]
        self._fails = fails

    def first(self, texts: Sequence[Texts | None]) -> list[list[Any]]:
        return [[] if t is None else [t["prompt"]] for t in texts]

    def again(self, ask: int, place: int, texts: Texts) -> Any:
        return texts["prompt"]

    def pieces(self, outputs: Sequence[Any], policy: Policy) -> list[Piece]:
        if self._fails == "count":
            return []
        if self._fails == "read" and "odd" in outputs:
            raise AttributeError("no such part")
        return [text_piece("output", output, policy) for output in outputs]

    def placeholder(self, output: Any) -> Any:
        return ""

    def redact(self, output: Any, spans: Sequence[Span]) -> Any:
        if self._fails == "redact":
            raise TypeError("cannot cut that")
        return "***"


def outcome(guard: Guard, job: Texted) -> Outcome:
    return drive(run(guard.route("llm", "text"), job))


def test_output_that_cannot_be_read_is_withheld_and_its_neighbours_are_not() -> None:
    found = outcome(Guard(outputs=[WordCheck("knife")]), Texted(["a", "odd", "b"], "read"))
    assert found.outputs == [["a"], [""], ["b"]]
    assert [r.failed for r in found.flat] == [False, True, False]
    assert found.flat[1].verdicts[0].error == "output cannot be read (AttributeError)"


def test_outputs_read_as_too_few_pieces_are_all_withheld() -> None:
    found = outcome(Guard(outputs=[WordCheck("knife")]), Texted(["a", "b"], "count"))
    assert found.outputs == [[""], [""]]
    assert [r.failed for r in found.flat] == [True, True]


def test_output_that_cannot_be_redacted_is_blocked() -> None:
    guard = Guard(outputs=[WordCheck("knife")], policy=text("redact"))
    found = outcome(guard, Texted(["a knife", "a spoon"], "redact"))
    assert found.outputs == [[""], ["a spoon"]]
    assert [r.action for r in found.flat] == [Action.BLOCK, Action.ALLOW]


def test_output_of_an_unknown_type_is_withheld_and_counted_apart() -> None:
    guard = Guard(outputs=[WordCheck("knife")])
    with pytest.raises(UnseenInput, match="output must be text, got bytes"):
        guard(lambda prompt: b"a knife")("anything")
    assert (guard.stats().failed, guard.stats().blocked) == (1, 0)


# --- sinks ------------------------------------------------------------------------------------


def test_sink_that_fails_ends_the_call_after_it_got_every_report() -> None:
    seen: list[Report] = []

    def sink(report: Report) -> None:
        seen.append(report)
        if report.verdicts and len(seen) < 3:
            raise OSError("audit disk is full")

    guard = Guard(inputs=[WordCheck("knife")], on_report=sink)
    with pytest.raises(OSError, match="audit disk is full"):
        guard.check_input(["a", "a knife"])
    assert len(seen) == 2
    assert (guard.stats().total, guard.check_input("good")[0].action) == (2, Action.ALLOW)


def test_sink_that_fails_does_not_hide_reports_from_a_capture() -> None:
    guard = Guard(inputs=[WordCheck("knife")], on_report=_refuse)
    with capture() as reports, pytest.raises(OSError, match="no"):
        guard.check_input(["a", "b"])
    assert len(reports) == 2


def _refuse(report: Report) -> None:
    raise OSError("no")


def test_sink_that_fails_keeps_an_output_back() -> None:
    with pytest.raises(OSError, match="no"):
        Guard(outputs=[WordCheck("knife")], on_report=_refuse)(echo)("anything")


class Broken(logging.Handler):
    """A log handler that raises, as one without a guard of its own does."""

    def handle(self, record: logging.LogRecord) -> bool:
        raise OSError("log disk is full")


@pytest.mark.parametrize(
    "guard",
    [
        Guard(inputs=[FailingCheck(when=lambda t: t != "good")]),
        Guard(inputs=[FailingCheck(when=lambda t: t != "good")], policy=policy(on_error="allow")),
        Guard(inputs=[WordCheck("anything")]),
        Guard(outputs=[FailingCheck(when=lambda t: t != "good")]),
    ],
    ids=["failure", "failure let through", "block", "output"],
)
def test_log_that_cannot_be_written_ends_the_call_and_releases_nothing(guard: Guard) -> None:
    logger, handler = logging.getLogger("safeguard"), Broken()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel("DEBUG")
    try:
        with pytest.raises(OSError, match="log disk is full"):
            guard(echo)("anything")
        assert guard(echo)("good") == "good"
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


# --- cancelled --------------------------------------------------------------------------------


def cancelled_in(entered: threading.Event, work: Any) -> None:
    """Cancel a task once `entered` is set."""

    async def cancel() -> None:
        task = asyncio.ensure_future(work())
        await asyncio.to_thread(entered.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())


def test_task_cancelled_in_a_check_makes_nothing_and_reports_nothing() -> None:
    check = HangingCheck()
    made: list[str] = []
    guard = Guard(inputs=[check])

    @guard
    async def reply(prompt: str) -> str:
        made.append(prompt)
        return prompt

    cancelled_in(check.entered, lambda: reply("anything"))
    check.release()
    assert (made, guard.stats().total) == ([], 0)
    assert is_usable(guard)


def test_task_cancelled_in_the_generation_stops_it() -> None:
    entered, stopped = threading.Event(), threading.Event()
    guard = words()

    @guard
    async def reply(prompt: str) -> str:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()
        return prompt

    cancelled_in(entered, lambda: reply("anything"))
    assert stopped.is_set()
    assert is_usable(guard)


def test_task_cancelled_in_a_refinement_uses_no_rewrite() -> None:
    entered, gate = threading.Event(), threading.Event()

    class Slow(SwapRefiner):
        def __call__(self, requests: Any, /) -> list[str]:
            entered.set()
            gate.wait(10)
            return super().__call__(requests)

    guard = Guard(inputs=[WordCheck("knife")], refiner=Slow({"knife": "spoon"}), policy=llm("refine"))
    made: list[str] = []

    @guard
    async def reply(prompt: str) -> str:
        made.append(prompt)
        return prompt

    cancelled_in(entered, lambda: reply("a knife"))
    gate.set()
    assert made == []
    assert guard.check_input("a knife")[0].revised_prompt == "a spoon"


def test_time_limit_around_a_guarded_call_is_a_cancellation() -> None:
    check = HangingCheck()
    guard = Guard(inputs=[check])

    async def limited() -> None:
        async with asyncio.timeout(0.02):
            await guard.acheck_input("anything")

    with pytest.raises(TimeoutError):
        asyncio.run(limited())
    check.release()
    assert is_usable(guard)


def test_flow_is_closed_when_its_driver_is_cancelled() -> None:
    closed, entered, gate = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        entered.set()
        gate.wait(10)

    def flow() -> Any:
        from safeguard.driving import Step

        try:
            yield Step(work)
        finally:
            closed.set()

    cancelled_in(entered, lambda: adrive(flow()))
    gate.set()
    assert closed.is_set()


def test_block_is_still_a_block_after_failures() -> None:
    guard = Guard(inputs=[FailingCheck(when=lambda t: "odd" in t), WordCheck("knife")])
    assert guard.check_input("odd")[0].failed
    with pytest.raises(Blocked):
        guard(echo)("a knife")
    assert (guard.stats().failed, guard.stats().blocked) == (1, 1)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_sink_that_fails_does_not_hide_why_a_stream_broke(error: type[BaseException]) -> None:
    def source() -> Iterator[str]:
        yield "some words "
        raise error("upstream")

    guard = Guard(outputs=[WordCheck("knife")], on_report=_lost)
    with pytest.raises(error, match="upstream"):
        list(guard.stream(source()))


def _lost(report: Report) -> None:
    raise ConnectionError("no audit")
