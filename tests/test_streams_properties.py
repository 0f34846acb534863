"""Whatever the text and its cuts: nothing flagged leaves, nothing is lost, the verdict is the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from safeguard import Blocked, Guard, Policy, capture
from safeguard.checks.blocklist import Blocklist
from safeguard.checks.text_classifier import TextClassifier
from safeguard.testing import WordCheck
from safeguard.types import Finding, Modality, Span

WORDS = ["kill", "bomb all", "ass", "бомба", "毒药"]
PARTS = [
    *(w[i:] for w in WORDS for i in range(len(w))),
    *("killed", "grass", "assume", "skill", "a", "the ", "loaf", " ", "  ", "\n", ".", "!", "-", "é", "日本"),
    *("k i l l", "s k i l l s", "k\u200bi\u200bl\u200bl", "k\u0301ill", "k1ll", "kiiill", "ｋｉｌｌ"),
    *("\u200b", "\u200d", "\u00ad", "\u0301", "\ufe0f", "\u2060", "👩\u200d👩\u200d👧", "🎈", "क्षि"),
]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=40).map("".join)
ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
CUTS = st.one_of(
    st.just([1]),  # one character at a time: inside every cluster
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
)
"""Sizes of the chunks, over and over."""
SIZES = st.tuples(st.integers(24, 60), st.integers(1, 30), st.integers(0, 60))


def cut(text: str, sizes: Sequence[int]) -> list[str]:
    out: list[str] = []
    while text:
        size = sizes[len(out) % len(sizes)]
        out.append(text[:size])
        text = text[size:]
    return out


def guard_of(check: Any, sizes: tuple[int, int, int], mode: str = "withhold") -> Guard:
    hold, step, context = sizes
    stream = {"mode": mode, "hold_chars": hold, "step_chars": step, "context_chars": context}
    return Guard(outputs=[check], policy=Policy.from_data({"stream": stream}))


def released(guard: Guard, chunks: Sequence[str]) -> tuple[str, bool]:
    """What came out, and whether the stream was blocked."""
    out: list[str] = []
    try:
        for chunk in guard.stream(iter(chunks)):
            out.append(chunk)  # what came before the end raises is kept
    except Blocked:
        return "".join(out), True
    return "".join(out), False


@cache
def blocklist() -> Blocklist:
    return Blocklist(WORDS)


@settings(max_examples=300, deadline=None)
@given(TEXTS, CUTS, SIZES)
@example("loaf " * 30 + "k" + "\u200b" * 200 + "ill", [1], (24, 1, 20))
@example("loaf " * 30 + "bomb" + " " * 200 + "all", [1], (24, 1, 20))
@example("loaf " * 30 + "k" + "i" * 200 + "ll", [1], (24, 1, 20))
@example("loaf " * 30 + "k i l l" + " or not" * 30, [1], (24, 1, 20))
def test_no_character_of_a_flagged_place_is_released(
    text: str, sizes: list[int], rules: tuple[int, int, int]
) -> None:
    guard = guard_of(blocklist(), rules)
    (report,) = guard.check_output([text])
    out, blocked = released(guard, cut(text, sizes))
    assert text.startswith(out)
    # no place is longer than the 8 letters of "bomb all" in its plain reading, and 24 or more are held
    assert len(out) <= min((span.start for span in report.spans), default=len(text))
    assert blocked or out == text


@settings(max_examples=300, deadline=None)
@given(TEXTS, CUTS, SIZES, st.sampled_from(["withhold", "sentence", "shadow"]))
@example("mass " * 20 + "ass" + "ume " * 20, [1], (24, 3, 20), "withhold")
@example("the s k i l l s of " * 20, [1], (24, 1, 20), "withhold")
@example("brass-" * 40, [1], (24, 1, 20), "withhold")
def test_verdict_is_that_of_the_unstreamed_text(
    text: str, sizes: list[int], rules: tuple[int, int, int], mode: str
) -> None:
    guard = guard_of(blocklist(), rules, mode)
    (report,) = guard.check_output([text])
    out, blocked = released(guard, cut(text, sizes))
    assert blocked == report.blocked
    assert blocked or out == text


@settings(max_examples=200, deadline=None)
@given(ANY, CUTS, SIZES)
def test_any_text_at_all_comes_through_whole_where_nothing_is_flagged(
    text: str, sizes: list[int], rules: tuple[int, int, int]
) -> None:
    assert released(guard_of(WordCheck("\ue000"), rules), cut(text.replace("\ue000", ""), sizes)) == (
        text.replace("\ue000", ""),
        False,
    )


@settings(max_examples=100, deadline=None)
@given(TEXTS, CUTS, SIZES)
def test_async_stream_releases_what_the_other_does(
    text: str, sizes: list[int], rules: tuple[int, int, int]
) -> None:
    guard = guard_of(blocklist(), rules)

    async def source() -> AsyncIterator[str]:
        for chunk in cut(text, sizes):
            yield chunk

    async def collect() -> tuple[str, bool]:
        out: list[str] = []
        try:
            async for chunk in guard.astream(source()):
                out.append(chunk)
        except Blocked:
            return "".join(out), True
        return "".join(out), False

    assert asyncio.run(collect()) == released(guard, cut(text, sizes))


class Between:
    """Flags all from `[` to `]`, however long, and nothing while only one of them is there."""

    name = "between"
    modality: Modality = "text"

    def __call__(self, batch: Sequence[str], /) -> list[Finding]:
        return [self._find(text) for text in batch]

    def _find(self, text: str) -> Finding:
        start = text.find("[")
        end = text.find("]", start)
        if start < 0 or end < 0:
            return Finding({"bad": 0.0})
        return Finding({"bad": 1.0}, (Span(start, end + 1, "bad"),))


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 120),
    st.integers(0, 150),
    st.integers(0, 90),
    CUTS,
    st.sampled_from(["a", "b c ", "\u200bx"]),
)
def test_of_a_place_longer_than_what_is_held_the_last_characters_stay_back(
    before: int, inside: int, after: int, sizes: list[int], filler: str
) -> None:
    hold, context = 30, 80
    text = (filler * 120)[:before] + "[" + (filler * 150)[:inside] + "]" + (filler * 90)[:after]
    start, end = text.index("["), text.index("]") + 1
    out, blocked = released(guard_of(Between(), (hold, 7, context)), cut(text, sizes))
    assert blocked
    if end - start <= hold:
        assert len(out) <= start
    elif end - start <= hold + context - 40:
        assert len(out) <= end - hold
    else:  # found when the whole is judged: the end of the text is withheld
        assert len(out) <= max(len(text) - hold, 0)


class AsAWhole:
    """Flags texts of 200 characters and more: none of their parts."""

    name = "as_a_whole"
    modality: Modality = "text"

    def __call__(self, batch: Sequence[str], /) -> list[Finding]:
        return [Finding({"bad": float(len(text) >= 200)}) for text in batch]


@given(st.integers(150, 260), CUTS)
def test_what_is_flagged_only_as_a_whole_is_found_at_the_end(length: int, sizes: list[int]) -> None:
    text = ("loaf and tea " * 20)[:length]
    out, blocked = released(guard_of(AsAWhole(), (40, 10, 60)), cut(text, sizes))
    assert blocked == (length >= 200)
    assert len(out) <= (length - 40 if blocked else length)


@cache
def model() -> TextClassifier:
    return TextClassifier.load("text-guard-s")


HARMLESS = (
    "The bakery opens at seven, and the bread is still warm when the first people come in. Later the garden "
    "needs water, because the summer was dry and the roses hang their heads. In the evening we read."
)
HARMFUL = "You are a worthless idiot and I hate you, shut up you stupid disgusting pig."


@pytest.mark.parametrize("size", [1, 7, 50])
@pytest.mark.parametrize(
    ("text", "wanted"),
    [(HARMLESS, False), (HARMLESS + " " + HARMFUL, True), (HARMFUL + " " + HARMLESS, True)],
)
def test_embedded_model_streams_to_the_verdict_of_the_whole(text: str, wanted: bool, size: int) -> None:
    guard = Guard(outputs=[model()], policy=Policy(operating_point="standard"))
    with capture() as reports:
        out, blocked = released(guard, [text[i : i + size] for i in range(0, len(text), size)])
    (whole,) = guard.check_output([text])
    assert blocked == whole.blocked == reports[-1].blocked == wanted
    assert text.startswith(out)
    assert out == text if not wanted else "idiot" not in out
