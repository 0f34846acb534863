"""Refiners that look at the picture: what they are given, and what becomes of a picture that passes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("PIL", reason="needs pillow")

from PIL import Image

from safeguard import Blocked, CheckFailed, Guard, RefineRequest, capture
from safeguard.testing import BrightCheck, WordCheck
from tests.policies import policy

SHADES = {"a lamp": 250, "a dim lamp": 100, "a candle": 40}


class Painter:
    """Draws each known prompt in its shade, others in black; remembers the prompts."""

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def __call__(self, prompt: str) -> Image.Image:
        self.prompts.append(prompt)
        return Image.new("L", (4, 4), SHADES.get(prompt, 0))


class Looking:
    """Gives its answers in turn; None keeps the prompt."""

    name = "looking"

    def __init__(self, *answers: str | None, always_judge: bool = False) -> None:
        self.answers, self.always_judge = list(answers), always_judge
        self.requests: list[RefineRequest] = []

    def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
        self.requests += requests
        answers = [self.answers.pop(0) for _ in requests]
        return [r.prompt if a is None else a for r, a in zip(requests, answers, strict=True)]


def drawn(refiner: Looking, painter: Painter, **parts: Any) -> Any:
    """A lamp by a guard that refines pictures brighter than .5."""
    rules = policy(output={"image": {"action": "refine", "threshold": 0.5}}, **parts)
    return Guard(outputs=[BrightCheck()], refiner=refiner, policy=rules)(painter, task="t2i")("a lamp")


def test_a_flagged_picture_is_handed_over_with_both_prompts() -> None:
    refiner, painter = Looking("a dim lamp"), Painter()
    assert drawn(refiner, painter).getpixel((0, 0)) == 100
    (request,) = refiner.requests
    assert (request.prompt, request.current, request.round) == ("a lamp", "a lamp", 1)
    assert [view.getpixel((0, 0)) for view in request.views] == [250]


def test_the_second_round_sees_the_prompt_of_the_first() -> None:
    SHADES["a bright lamp"] = 240
    refiner, painter = Looking("a bright lamp", "a candle"), Painter()
    drawn(refiner, painter)
    assert [(r.prompt, r.current) for r in refiner.requests] == [
        ("a lamp", "a lamp"),
        ("a lamp", "a bright lamp"),
    ]


def lenient(refiner: Looking, painter: Painter, **parts: Any) -> Any:
    """A lamp by a guard whose check passes every picture."""
    rules = policy(output={"image": {"action": "refine", "threshold": 1.0}}, **parts)
    guard = Guard(inputs=[WordCheck("candle")], outputs=[BrightCheck()], refiner=refiner, policy=rules)
    return guard(painter, task="t2i")("a lamp")


def test_a_picture_that_passes_is_not_shown_by_default() -> None:
    refiner = Looking()
    lenient(refiner, Painter())
    assert refiner.requests == []


def test_always_judging_sees_a_picture_that_passes_and_keeps_it() -> None:
    refiner, painter = Looking(None, always_judge=True), Painter()
    lenient(refiner, painter)
    assert painter.prompts == ["a lamp"]
    assert (refiner.requests[0].flagged, len(refiner.requests[0].views)) == ((), 1)


def test_always_judging_goes_on_until_the_refiner_keeps() -> None:
    refiner, painter = Looking("a dim lamp", None, always_judge=True), Painter()
    with capture() as reports:
        assert lenient(refiner, painter).getpixel((0, 0)) == 100
    assert painter.prompts == ["a lamp", "a dim lamp"]
    assert (reports[0].action.value, reports[0].revised_prompt, reports[0].rounds) == (
        "refine",
        "a dim lamp",
        1,
    )


def test_always_judging_ends_with_the_rounds() -> None:
    refiner, painter = Looking("one", "two", "three", always_judge=True), Painter()
    lenient(refiner, painter, max_rounds=2)
    assert painter.prompts == ["a lamp", "one", "two"]


def test_a_refiner_that_always_judges_and_fails_closes() -> None:
    with pytest.raises(CheckFailed, match="gave no text"):
        lenient(Looking("", always_judge=True), Painter())


def test_a_failure_passes_only_where_the_policy_says_so() -> None:
    picture = lenient(Looking("", always_judge=True), Painter(), on_error="allow")
    assert picture.getpixel((0, 0)) == 250


def test_an_unsafe_rewrite_of_a_picture_that_passes_blocks() -> None:
    painter = Painter()
    with pytest.raises(Blocked):
        lenient(Looking("a candle", always_judge=True), painter)
    assert painter.prompts == ["a lamp"]


def test_a_policy_that_only_monitors_asks_nobody() -> None:
    refiner = Looking(always_judge=True)
    lenient(refiner, Painter(), mode="monitor")
    assert refiner.requests == []


def test_always_judging_needs_no_check_and_no_refine_action() -> None:
    refiner, painter = Looking("a dim lamp", None, always_judge=True), Painter()
    guard = Guard(refiner=refiner, policy=policy(output={"image": {"action": "block"}}))
    assert guard(painter, task="t2i")("a lamp").getpixel((0, 0)) == 100


def unchecked(refiner: Looking, painter: Painter, **parts: Any) -> Any:
    """A lamp by a guard without any check, whose refiner alone judges."""
    return Guard(refiner=refiner, policy=policy(**parts))(painter, task="t2i")("a lamp")


def test_the_last_picture_is_kept_or_blocked_where_no_check_judges_it() -> None:
    refiner, painter = Looking("one", "two", always_judge=True), Painter()
    with pytest.raises(Blocked, match=r"blocked by looking: not_kept 1\.00"):
        unchecked(refiner, painter, max_rounds=1)
    assert painter.prompts == ["a lamp", "one"]
    assert (refiner.requests[1].current, refiner.requests[1].round) == ("one", 2)


def test_the_last_picture_passes_where_the_refiner_keeps_it() -> None:
    assert (
        unchecked(Looking("a dim lamp", None, always_judge=True), Painter(), max_rounds=1).getpixel((0, 0))
        == 100
    )


def test_without_rounds_the_refiner_still_judges_what_no_check_does() -> None:
    with pytest.raises(Blocked):
        unchecked(Looking("one", always_judge=True), Painter(), max_rounds=0)


def test_a_refiner_that_fails_on_the_last_picture_closes() -> None:
    with pytest.raises(CheckFailed, match="gave no text"):
        unchecked(Looking("one", "", always_judge=True), Painter(), max_rounds=1)


def test_keeping_what_a_redacted_prompt_drew_does_not_bring_the_prompt_back() -> None:
    rules = policy(input={"t2i": {"action": "redact"}}, placeholder_text="...")
    refiner, painter = Looking(None, always_judge=True), Painter()
    guard = Guard(inputs=[WordCheck("lamp")], refiner=refiner, policy=rules)
    guard(painter, task="t2i")("a lamp")
    assert painter.prompts == ["a ..."]
