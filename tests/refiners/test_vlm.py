"""A scripted model shows what a picture refiner is asked and what becomes of each answer."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safeguard.errors import RefinerError
from safeguard.refiners.language_model import Answer
from safeguard.refiners.template import RefinerTemplate
from safeguard.refiners.vlm import SIZE_PX, VLMRefiner, sheet, shown
from safeguard.testing import SwapRefiner
from safeguard.types import RefineRequest
from tests.faults.faults import in_fork

TEMPLATE = RefinerTemplate(version="test", system="Rewrite.", user="Prompt: {prompt} Drawn: {current}")
RED = Image.new("RGB", (40, 30), (200, 0, 0))


class Scripted:
    """Gives one answer to all; remembers what it was asked and shown. Its special token is <end>."""

    special = re.compile("<end>")

    def __init__(self, answer: str, *, whole: bool = True, window: int = 4096, fits: bool = True) -> None:
        self.said, self.whole, self.window, self.fits = answer, whole, window, fits
        self.texts: list[str] = []
        self.pictures: list[Any] = []

    def encode(self, text: str) -> list[int]:
        return list(range(len(text.split())))

    def render(self, turns: Sequence[dict[str, str]], *, picture: bool) -> str:
        return "<img>" * picture + " | ".join(turn["content"] for turn in turns)

    def answer(
        self, text: str, picture: Any | None, limit: int, *, stop: Callable[[], bool] | None = None
    ) -> Answer | None:
        if stop is not None and stop():
            raise RefinerError("the generation was stopped before its end")
        self.texts.append(text)
        self.pictures.append(picture)
        return Answer(self.said, self.whole) if self.fits else None


def seen(prompt: str = "a bad cat", *, flagged: tuple[str, ...] = ("bad",), **more: Any) -> RefineRequest:
    return RefineRequest(prompt, flagged, result=RED, round=1, **{"views": (RED,), **more})


def ask(model: Scripted, request: RefineRequest, **options: Any) -> str:
    return VLMRefiner(model, TEMPLATE, **options)([request])[0]


def test_the_model_sees_original_current_prompt_and_picture() -> None:
    model = Scripted("a calm cat")
    assert ask(model, seen(current="an odd cat")) == "a calm cat"
    assert model.texts == ["<img>Rewrite. | Prompt: a bad cat Drawn: an odd cat"]
    assert model.pictures[0].getpixel((0, 0)) == (200, 0, 0)


def test_before_anything_is_drawn_it_reads_the_text_alone() -> None:
    model = Scripted("a calm cat")
    ask(model, RefineRequest("a bad cat", ("bad",)))
    assert (model.texts, model.pictures) == (["Rewrite. | Prompt: a bad cat Drawn: a bad cat"], [None])


@pytest.mark.parametrize("answer", ["keep", "Keep.", '"keep"', "A bad cat!"])
def test_keep_and_an_echo_leave_the_prompt(answer: str) -> None:
    assert ask(Scripted(answer), seen()) == "a bad cat"


@pytest.mark.parametrize("answer", ["", "I'm sorry, but I cannot look at that.", "a cat " * 12, "?!"])
def test_an_answer_of_no_use_is_no_keep(answer: str) -> None:
    assert ask(Scripted(answer), seen(flagged=())) == ""


def test_the_answer_loses_its_wrapping() -> None:
    assert ask(Scripted('Refined prompt: "a calm cat"'), seen()) == "a calm cat"


def test_an_answer_that_was_cut_off_ends_at_a_word() -> None:
    assert ask(Scripted("a calm cat on a ma", whole=False), seen()) == "a calm cat on a"


def test_special_tokens_in_both_prompts_become_blanks() -> None:
    model = Scripted("a calm cat")
    ask(model, seen("a<end>cat", current="b<end>cat"))
    assert model.texts == ["<img>Rewrite. | Prompt: a cat Drawn: b cat"]


def test_a_megabyte_is_not_even_tokenised() -> None:
    model = Scripted("a calm cat", window=512)
    assert ask(model, seen("x" * 1_000_000)) == ""
    assert model.texts == []


def test_what_does_not_fit_into_the_window_is_a_failure() -> None:
    assert ask(Scripted("a calm cat", fits=False), seen()) == ""


def test_an_unflagged_result_that_cannot_be_shown_is_a_failure() -> None:
    model = Scripted("keep")
    assert ask(model, RefineRequest("a cat", result=object(), round=1), always_judge=True) == ""
    assert model.texts == []


def test_a_flagged_result_that_cannot_be_shown_is_answered_from_the_text() -> None:
    model = Scripted("a calm cat")
    broken = np.full((8, 8, 3), np.nan)
    assert ask(model, seen(views=(broken,))) == "a calm cat"
    assert model.pictures == [None]


def test_the_fallback_answers_for_a_failure_but_never_for_a_picture_that_passes() -> None:
    softener = SwapRefiner({"bad": "calm"})
    refiner = VLMRefiner(Scripted(""), TEMPLATE, fallback=softener)
    assert refiner([seen(), seen(flagged=())]) == ["a calm cat", ""]
    assert refiner.name == "vlm+swap"


def test_a_fallback_that_gives_too_few_texts_is_an_error() -> None:
    class Odd:
        name = "odd"

        def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
            return []

    with pytest.raises(RefinerError, match="'odd' gave 0 texts for 1 prompts"):
        ask(Scripted(""), seen(), fallback=Odd())


def test_a_generation_past_its_time_is_given_up() -> None:
    with pytest.raises(RefinerError, match="stopped before its end"):
        ask(Scripted("keep"), seen(), timeout_s=1e-9)


def test_a_time_limit_must_be_above_zero() -> None:
    with pytest.raises(ValueError, match="timeout_s must be above 0, got 0"):
        VLMRefiner(Scripted("keep"), timeout_s=0)


def test_no_request_gives_no_answer() -> None:
    assert VLMRefiner(Scripted("keep"))([]) == []


def test_the_shipped_template_asks_for_keep_and_holds_both_prompts() -> None:
    template = VLMRefiner(Scripted("keep")).template
    assert template.keep == "keep"
    assert template.fill("{current}", "b") == "Original prompt: {current}\nDrawn from: b"


def test_a_text_result_is_no_picture() -> None:
    assert shown(RefineRequest("a", result="some text", round=1)) is None


def test_what_transparency_hides_is_shown_beside_the_rest() -> None:
    clear = Image.new("RGBA", (10, 10), (200, 0, 0, 0))
    picture = shown(RefineRequest("a", result=clear, round=1))
    assert picture is not None
    assert picture.width > 10


def test_frames_are_set_side_by_side() -> None:
    frames = [Image.new("RGB", (10, 20), (shade, 0, 0)) for shade in (10, 20, 30)]
    whole = sheet(frames)
    # three frames: two columns, two rows
    assert whole.size == (20, 40)
    assert [whole.getpixel(at) for at in ((0, 0), (10, 0), (0, 20), (10, 20))] == [
        (10, 0, 0),
        (20, 0, 0),
        (30, 0, 0),
        (0, 0, 0),
    ]


def test_a_large_picture_is_made_smaller() -> None:
    assert sheet([Image.new("RGB", (4 * SIZE_PX, 2 * SIZE_PX))]).size == (SIZE_PX, SIZE_PX // 2)


def test_special_tokens_in_compatibility_forms_are_no_tokens_either() -> None:
    model = Scripted("a calm cat")
    ask(model, seen("a＜end＞b", current="c＜end＞d"))
    assert "Prompt: a b Drawn: c d" in model.texts[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_forked_during_a_generation_can_refine() -> None:
    class Forking(Scripted):
        """Forks in the middle of an answer, and asks again there from another thread."""

        forked: str = ""

        def answer(self, *args: Any, **options: Any) -> Answer | None:
            if not self.forked:
                self.forked = "here"
                self.forked = in_fork(lambda: in_thread(refiner), limit_s=10)
            return super().answer(*args, **options)

    def in_thread(refiner: VLMRefiner) -> str:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(refiner, [seen()]).result()[0]

    model = Forking("a calm cat")
    refiner = VLMRefiner(model, TEMPLATE)
    refiner([seen()])
    assert model.forked == "a calm cat"
