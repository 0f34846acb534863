"""Held-back streams: whatever the cuts, no flagged text is released and nothing clean is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeguard import Action, Blocked, Guard, Policy, capture
from safeguard.testing import WordCheck

ALPHABET = st.text(alphabet="abn k\n.", max_size=120)
CUTS = st.lists(st.integers(min_value=1, max_value=9), max_size=60)


def cut(text: str, sizes: list[int]) -> list[str]:
    out = []
    for size in sizes:
        out.append(text[:size])
        text = text[size:]
    return [*out, text]


def guard(mode: str, hold: int = 3) -> Guard:
    stream = {"mode": mode, "hold_chars": hold, "step_chars": 2, "context_chars": 6}
    return Guard(outputs=[WordCheck("bank")], policy=Policy.from_data({"stream": stream}))


def released(text: str, sizes: list[int], mode: str) -> tuple[str, bool]:
    out: list[str] = []
    try:
        for chunk in guard(mode).stream(iter(cut(text, sizes))):
            out.append(chunk)
    except Blocked:
        return "".join(out), True
    return "".join(out), False


@given(ALPHABET, CUTS)
def test_no_character_of_a_flagged_span_is_released(text: str, sizes: list[int]) -> None:
    out, _ = released(text, sizes, "withhold")
    assert text.startswith(out)
    assert len(out) <= (text.find("bank") if "bank" in text else len(text))


@given(ALPHABET, CUTS, st.sampled_from(["withhold", "sentence", "shadow"]))
def test_verdict_is_that_of_the_unstreamed_text(text: str, sizes: list[int], mode: str) -> None:
    out, blocked = released(text, sizes, mode)
    assert blocked == ("bank" in text)
    if not blocked:
        assert out == text


def test_sentence_mode_releases_whole_sentences() -> None:
    chunks = list(guard("sentence").stream(["One two. Th", "ree four! Fi", "ve"]))
    assert chunks == ["One two. ", "Three four! ", "Five"]


def test_shadow_mode_releases_at_once_and_raises_at_the_end() -> None:
    seen = []
    stream = guard("shadow").stream(["a ", "bank"])
    seen += [next(stream), next(stream)]
    with pytest.raises(Blocked):
        next(stream)
    assert seen == ["a ", "bank"]


def test_async_stream_is_held_back_too() -> None:
    async def source() -> AsyncIterator[str]:
        for part in ["all clear so far, then a ba", "nk"]:
            yield part

    async def collect() -> list[str]:
        out: list[str] = []
        try:
            async for part in guard("withhold").astream(source()):
                out.append(part)
        except Blocked:
            return out
        pytest.fail("the stream was not stopped")

    assert "ba" not in "".join(asyncio.run(collect()))


def test_checks_grow_linearly_with_the_stream() -> None:
    def characters(n: int) -> int:
        check = WordCheck("bank")
        policy = Policy.from_data({"stream": {"hold_chars": 20, "step_chars": 10, "context_chars": 40}})
        list(Guard(outputs=[check], policy=policy).stream(iter("loaf and tea " * (n // 13))))
        return sum(map(len, check.seen))

    # a window of at most 40 + 20 + 10 characters every 10, and the whole once at the end: below 8 a character
    assert characters(4000) <= 8 * 4000


def test_stream_that_its_reader_leaves_is_reported_and_closed() -> None:
    closed: list[bool] = []

    def source() -> Iterator[str]:
        try:
            yield from ["all clear and ", "more to come, ", "and more"]
        finally:
            closed.append(True)

    with capture() as reports:
        stream = guard("withhold").stream(source())
        next(stream)
        stream.close()
    assert closed == [True]
    assert [r.action for r in reports] == [Action.ALLOW]
