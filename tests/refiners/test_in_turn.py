"""Scripted refiners show who is asked, with what, and what becomes of what they give."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import pytest

from safeguard.errors import BackendError, RefinerError
from safeguard.refiners.in_turn import InTurn
from safeguard.types import RefineRequest, Span


class Asked:
    """Answers with what `answer` makes of each prompt; remembers what it was asked."""

    def __init__(self, name: str, answer: Callable[[str], str]) -> None:
        self.name = name
        self._answer = answer
        self.calls: list[list[RefineRequest]] = []

    def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
        self.calls.append(list(requests))
        return [self._answer(request.prompt) for request in requests]

    @property
    def prompts(self) -> list[str]:
        return [request.prompt for call in self.calls for request in call]


def model(answer: Callable[[str], str] = lambda text: f"{text} in peace") -> Asked:
    return Asked("model", answer)


def softener() -> Asked:
    return Asked("softener", lambda text: text.replace("knife", "spoon"))


def test_the_first_is_asked_and_the_last_is_not_where_that_gave_a_rewrite() -> None:
    last = softener()
    assert InTurn(model(), last)([RefineRequest("a knife")]) == ["a knife in peace"]
    assert last.calls == []


@pytest.mark.parametrize("answer", ["a knife", "", "  "])
def test_what_is_no_rewrite_goes_to_the_last(answer: str) -> None:
    assert InTurn(model(lambda _: answer), softener())([RefineRequest("a knife")]) == ["a spoon"]


def test_the_second_time_the_first_gets_its_own_rewrite_without_the_old_places() -> None:
    first = model()
    request = RefineRequest("a knife", spans=(Span(2, 7, "violence"),), tried=("a blade",))
    assert InTurn(first, softener())([request]) == ["a blade in peace"]
    assert [(r.prompt, r.spans) for r in first.calls[0]] == [("a blade", ())]


def test_after_its_tries_the_last_gets_the_original() -> None:
    first, last = model(), softener()
    refiner = InTurn(first, last, tries=2)
    assert refiner([RefineRequest("a knife", tried=("a blade", "a sword"))]) == ["a spoon"]
    assert (first.calls, last.prompts) == ([], ["a knife"])


def test_it_may_be_asked_once_more_than_the_first() -> None:
    assert InTurn(model(), softener(), tries=2).attempts == 3


def test_a_rewrite_that_was_tried_already_is_none() -> None:
    refiner = InTurn(model(lambda _: "a blade"), softener())
    assert refiner([RefineRequest("a knife", tried=("a blade",))]) == ["a spoon"]


def test_a_failure_of_the_first_is_logged_and_the_last_serves(caplog: pytest.LogCaptureFixture) -> None:
    def fails(_: str) -> str:
        raise BackendError("out of memory")

    with caplog.at_level(logging.ERROR, "safeguard"):
        assert InTurn(model(fails), softener())([RefineRequest("a knife")]) == ["a spoon"]
    assert "refiner failed: refiner=model error=BackendError" in caplog.text


def test_each_prompt_keeps_its_place() -> None:
    refiner = InTurn(model(lambda text: text if "knife" in text else f"{text}!"), softener())
    texts = ["a cat", "a knife", "a dog"]
    assert refiner([RefineRequest(text) for text in texts]) == ["a cat!", "a spoon", "a dog!"]


def test_the_first_gets_so_many_at_once() -> None:
    first = model()
    InTurn(first, softener(), at_once=2)([RefineRequest(text) for text in "abc"])
    assert [len(call) for call in first.calls] == [2, 1]


def test_when_the_time_is_over_the_rest_goes_to_the_last(caplog: pytest.LogCaptureFixture) -> None:
    # the clock is read at the start and before each prompt: 0, 0, 6, 12
    times = iter([0.0, 0.0, 6.0, 12.0])
    refiner = InTurn(model(), softener(), limit_s=10, clock=lambda: next(times))
    found = refiner([RefineRequest(text) for text in ("knife 1", "knife 2", "knife 3")])
    assert found == ["knife 1 in peace", "knife 2 in peace", "spoon 3"]
    assert "out of time: refiner=model left=1 of 3" in caplog.text


def test_nothing_asked_gives_nothing() -> None:
    assert InTurn(model(), softener())([]) == []


def test_one_text_for_two_prompts_is_refused() -> None:
    class Short:
        name = "short"

        def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
            return ["one"]

    refiner = InTurn(model(lambda text: text), Short())
    with pytest.raises(RefinerError, match="'short' gave 1 texts for 2 prompts"):
        refiner([RefineRequest("a"), RefineRequest("b")])


def test_the_name_tells_both() -> None:
    assert InTurn(model(), softener()).name == "model+softener"


@pytest.mark.parametrize(
    "options", [{"tries": 0}, {"at_once": 0}, {"limit_s": 0.0}, {"limit_s": float("nan")}]
)
def test_settings_that_ask_for_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        InTurn(model(), softener(), **options)  # type: ignore[arg-type]
