"""Held-back streams: whatever the cuts, no flagged text is released and nothing clean is lost."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeguard import Action, Blocked, Guard, Policy, capture
from safeguard.checks.blocklist import Blocklist
from safeguard.driving import drive
from safeguard.streams import HeldText
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


def test_a_beginning_of_a_word_is_not_taken_for_the_word() -> None:
    # "ass" is flagged as a whole word only, and stands in grass, class, assume and pass wherever they are cut
    text = "the grass of the class will assume that a pass is an assault on the mass " * 9
    for size in range(1, 9):
        chunks = (text[i : i + size] for i in range(0, len(text), size))
        assert "".join(Guard(outputs=[Blocklist(["ass"])]).stream(chunks)) == text


def test_text_without_spaces_is_released_before_the_end() -> None:
    assert len(list(guard("withhold").stream(["字"] * 200))) > 10


@pytest.mark.parametrize("part", [{"mode": "monitor"}, {"on_error": "allow"}])
def test_what_is_let_through_unjudged_keeps_its_place_and_stays_in_the_report(part: dict[str, str]) -> None:
    chunks: list[Any] = ["one ", b"two", "three ", "four " * 9, "five"]  # 50 characters are over the limit
    policy = Policy.from_data({**part, "max_chars": 20})
    with capture() as reports:
        out: list[Any] = list(Guard(outputs=[WordCheck("bank")], policy=policy).stream(chunks))
    at = out.index(b"two")
    assert "".join(out[:at]) == "one "
    assert "".join(out[at + 1 :]) == "three " + "four " * 9 + "five"
    assert reports[0].action is Action.MONITOR
    assert any("max_chars" in (v.error or "") for v in reports[0].verdicts)


def test_source_that_gives_nothing_for_long_is_not_stored() -> None:
    held = HeldText(Guard(outputs=[WordCheck("bank")]).route("llm", "text"))
    drive(held.feed("a"))
    before = len(pickle.dumps(held._text))
    for _ in range(1000):
        drive(held.feed(""))
    assert len(pickle.dumps(held._text)) == before


def test_end_of_a_long_stream_is_read_in_a_step_of_its_own_before_it_is_checked() -> None:
    held = HeldText(Guard(outputs=[WordCheck("bank")]).route("llm", "text"))
    drive(held.feed("k i l l n o w " * 400))  # 5,600 characters
    flow = held.finish()
    (piece,) = next(flow).run()
    flow.close()
    assert piece.source == "output"


def test_source_that_cannot_be_closed_does_not_hide_that_the_stream_was_blocked() -> None:
    def source() -> Iterator[str]:
        try:
            yield from ["bank "] * 9
        finally:
            raise OSError

    with capture() as reports, pytest.raises(Blocked):
        list(guard("withhold").stream(source()))
    assert [r.action for r in reports] == [Action.BLOCK]


def test_async_source_that_cannot_be_closed_does_not_hide_that_the_stream_was_blocked() -> None:
    async def source() -> AsyncIterator[str]:
        try:
            for _ in range(9):
                yield "bank "
        finally:
            raise OSError

    async def run() -> None:
        async for _ in guard("withhold").astream(source()):
            pass

    with capture() as reports, pytest.raises(Blocked):
        asyncio.run(run())
    assert [r.action for r in reports] == [Action.BLOCK]
