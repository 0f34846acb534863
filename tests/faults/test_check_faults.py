"""A check that fails in any way withholds the content, is counted apart, and the next call works."""

from __future__ import annotations

import asyncio
import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from safeguard import Blocked, CheckFailed, Coverage, Finding, Guard, Span, capture
from safeguard.testing import BrightCheck, FailingCheck, WordCheck
from tests.faults.faults import Told, is_usable
from tests.policies import echo, policy

GOOD = {"bad": 0.0}


class DeviceLost(Exception):
    """As drivers raise it."""


class OutOfMemoryError(RuntimeError):
    """Named as torch.cuda.OutOfMemoryError is."""


def fail(error: BaseException) -> Callable[[Sequence[Any]], Any]:
    def do(batch: Sequence[Any]) -> Any:
        raise error

    return do


# --- raises -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        DeviceLost("secret-4711"),
        OutOfMemoryError("secret-4711"),
        MemoryError("secret-4711"),
        RecursionError("secret-4711"),
        StopIteration("secret-4711"),
        StopAsyncIteration("secret-4711"),
        TimeoutError("secret-4711"),
        UnicodeDecodeError("utf-8", b"secret-4711", 0, 1, "secret-4711"),
        ExceptionGroup("secret-4711", [ValueError("secret-4711")]),
        CheckFailed("other"),
        Blocked([Guard(inputs=[WordCheck("a")]).check_input("a")[0]]),
    ],
    ids=lambda e: type(e).__name__,
)
def test_error_of_a_check_withholds_is_counted_apart_and_leaves_the_guard_usable(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    guard = Guard(inputs=[Told(fail(error))])
    with caplog.at_level("DEBUG", "safeguard"), pytest.raises(CheckFailed) as info:
        guard(echo)("anything")

    assert f"failed with {type(error).__name__}" in str(info.value)
    assert "secret-4711" not in caplog.text + str(info.value) + repr(info.value)
    assert is_usable(guard)
    stats = guard.stats()
    assert (stats.passed, stats.blocked, stats.failed) == (1, 0, 1)
    assert stats.errors == {"told": {f"failed with {type(error).__name__}": 1}}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
@pytest.mark.parametrize("timeout_s", [None, 30])
def test_what_ends_a_program_passes_through_a_check(
    error: type[BaseException], timeout_s: float | None
) -> None:
    guard = Guard(inputs=[Told(fail(error()))], policy=policy(check_timeout_s=timeout_s, on_error="allow"))
    made: list[str] = []
    with capture() as reports, pytest.raises(error):
        guard(made.append)("anything")

    assert (made, reports, guard.stats().total) == ([], [], 0)
    assert is_usable(guard)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, asyncio.CancelledError])
def test_what_ends_a_program_passes_through_an_event_loop(error: type[BaseException]) -> None:
    guard = Guard(inputs=[Told(fail(error()))], policy=policy(on_error="allow"))
    with pytest.raises(error):
        asyncio.run(guard.acheck_input("anything"))
    assert guard.stats().total == 0
    assert is_usable(guard)


def test_panic_of_a_part_in_rust_is_a_failure_and_not_the_end_of_the_program() -> None:
    # pyo3 (tokenizers, safetensors) raises its panics as a BaseException of this module
    panic = type("PanicException", (BaseException,), {"__module__": "pyo3_runtime"})
    guard = Guard(inputs=[Told(fail(panic("secret-4711")))])
    with pytest.raises(CheckFailed, match="'told' failed with RuntimeError"):
        guard(echo)("anything")
    assert is_usable(guard)


def test_out_of_memory_with_a_batch_does_not_take_the_items_that_fit() -> None:
    def do(batch: Sequence[str]) -> Any:
        if len(batch) > 1 or batch[0] == "huge":
            raise MemoryError
        return [GOOD]

    guard = Guard(inputs=[Told(do)])
    reports = guard.check_input(["small", "huge", "tiny"])
    assert [r.failed for r in reports] == [False, True, False]
    assert is_usable(guard)


def test_failing_output_check_withholds_what_was_made() -> None:
    guard = Guard(outputs=[FailingCheck(when=lambda item: item != "good")])
    with pytest.raises(CheckFailed) as info:
        guard(echo)("unjudged")
    assert info.value.output == ""
    assert guard(echo)("good") == "good"


def test_failing_image_check_withholds() -> None:
    guard = Guard(outputs=[FailingCheck(modality="image", name="image")])
    (report,) = guard.check_output([[[0.0]]], modality="image")
    assert report.failed


def test_open_policy_counts_what_it_lets_through() -> None:
    guard = Guard(inputs=[FailingCheck()], policy=policy(on_error="allow"))
    assert guard(echo)("anything") == "anything"
    stats = guard.stats()
    assert (stats.passed, stats.let_through, stats.failed) == (1, 1, 0)


def test_block_is_counted_as_a_block() -> None:
    guard = Guard(inputs=[WordCheck("knife")])
    guard.check_input(["a knife", "a spoon"])
    stats = guard.stats()
    assert (stats.passed, stats.blocked, stats.failed, stats.total) == (1, 1, 0, 2)


# --- gives something else -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "why"),
    [
        (lambda b: None, "failed with TypeError"),
        (lambda b: [], "failed with ValueError"),
        (lambda b: [GOOD] * (len(b) + 1), "failed with ValueError"),
        (lambda b: [GOOD] * 2 * len(b), "failed with ValueError"),
        (lambda b: (GOOD for _ in b), "failed with TypeError"),
        (lambda b: "x" * len(b), "gave str, a row must be a Finding or scores"),
        (lambda b: [None] * len(b), "gave NoneType, a row must be a Finding or scores"),
        (lambda b: [0.2] * len(b), "gave float, a row must be a Finding or scores"),
        (lambda b: [{}] * len(b), "gave no scores"),
        (lambda b: [{"bad": math.nan}] * len(b), "gave NaN for 'bad', scores must be in [0, 1]"),
        (lambda b: [{"bad": math.inf}] * len(b), "gave inf for 'bad', scores must be in [0, 1]"),
        (lambda b: [{"bad": 2}] * len(b), "gave 2 for 'bad', scores must be in [0, 1]"),
        (lambda b: [{"bad": -1e-9}] * len(b), "gave -1e-09 for 'bad', scores must be in [0, 1]"),
        (lambda b: [{"bad": "0.1"}] * len(b), "failed with TypeError"),
        (lambda b: [{"bad": None}] * len(b), "failed with TypeError"),
        (
            lambda b: [{"bad": 0.0, "worse": math.nan}] * len(b),
            "gave NaN for 'worse', scores must be in [0, 1]",
        ),
        (lambda b: [{7: 0.0}] * len(b), "gave a category of type int, it must be a name"),
        (lambda b: [Finding(None)] * len(b), "gave NoneType, a row must be a Finding or scores"),  # type: ignore[arg-type]
        (lambda b: [Finding(GOOD, coverage=5)] * len(b), "gave a coverage of type int"),  # type: ignore[arg-type]
        (lambda b: [Finding(GOOD, (None,))] * len(b), "gave a span that is no Span of a category"),  # type: ignore[arg-type]
        (lambda b: [Finding(GOOD, (Span(0, 99, "bad"),))] * len(b), "gave a span outside 0 to 8"),
        (lambda b: [Finding(GOOD, (Span(3, 1, "bad"),))] * len(b), "gave a span outside 0 to 8"),
        (lambda b: [Finding(GOOD, (Span(-1, 1, "bad"),))] * len(b), "gave a span outside 0 to 8"),
        (lambda b: [Finding(GOOD, (Span(0.5, 1, "bad"),))] * len(b), "gave a span outside 0 to 8"),  # type: ignore[arg-type]
        (
            lambda b: [Finding(GOOD, (Span(0, 1, "bad", math.nan),))] * len(b),
            "gave a span whose score is not in [0, 1]",
        ),
    ],
)
def test_malformed_result_withholds_says_why_and_leaves_the_guard_usable(
    result: Callable[[Sequence[str]], Any], why: str
) -> None:
    guard = Guard(inputs=[Told(result)])
    (report,) = guard.check_input("anything"[:8])
    assert (report.failed, report.verdicts[0].error) == (True, why)
    assert is_usable(guard)


def test_one_bad_row_does_not_take_its_neighbours() -> None:
    guard = Guard(inputs=[Told(lambda b: [{"bad": math.nan if t == "odd" else 0.0} for t in b])])
    assert [r.failed for r in guard.check_input(["a", "odd", "b"])] == [False, True, False]


def test_check_that_empties_its_batch_gives_too_few_rows() -> None:
    def do(batch: Any) -> Any:
        batch.clear()
        return []

    guard = Guard(inputs=[Told(do)])
    assert guard.check_input("anything")[0].failed
    assert is_usable(guard)


def test_sound_coverage_and_spans_are_kept() -> None:
    found = Finding({"bad": 1.0}, (Span(0, 3, "bad"),), Coverage("tokens", 1, 1))
    (report,) = Guard(inputs=[Told(lambda b: [found] * len(b))]).check_input("bad text")
    assert (report.spans, report.verdicts[0].coverage) == (found.spans, found.coverage)


@pytest.mark.parametrize("part", ["inputs", "outputs"])
def test_what_is_no_check_is_refused_when_the_guard_is_made(part: str) -> None:
    with pytest.raises(TypeError, match=rf"{part} take checks \(name, modality, callable\), got object"):
        Guard(**{part: [object()]})  # type: ignore[arg-type]


def test_image_that_no_check_can_read_is_withheld() -> None:
    guard = Guard(outputs=[BrightCheck()])
    assert guard.check_output(["no picture"], modality="image")[0].failed
    assert not guard.check_output([[[0.0]]], modality="image")[0].failed


class Unwilling:
    """A picture that takes more memory than there is."""

    def __getattr__(self, name: str) -> object:
        raise MemoryError(name)


def test_picture_that_cannot_be_looked_at_closely_is_withheld_alone() -> None:
    guard = Guard(outputs=[BrightCheck()], policy=policy(image_tiles=2))
    black = np.zeros((64, 64, 3), np.uint8)
    reports = guard.check_output([Unwilling(), black], modality="image")
    assert [r.failed for r in reports] == [True, False]


def test_text_that_cannot_be_normalised_is_withheld_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = unicodedata.normalize

    def full(form: str, text: str) -> str:
        if "\u2460" in text:
            raise MemoryError
        return plain(form, text)  # type: ignore[arg-type]

    monkeypatch.setattr(unicodedata, "normalize", full)  # the interpreter's own
    reports = Guard(inputs=[WordCheck("knife")]).check_input(["odd \u2460", "good"])
    assert [r.failed for r in reports] == [True, False]
    assert reports[0].verdicts[0].error == "prompt cannot be read (MemoryError)"
