"""Held-back streams: whatever the cuts, no flagged text is released and nothing clean is lost."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeguard import Action, Blocked, CheckFailed, CheckTimeout, Guard, Policy, capture
from safeguard.checks.blocklist import Blocklist
from safeguard.driving import drive
from safeguard.held_text import HeldText
from safeguard.testing import FailingCheck, HangingCheck, WordCheck

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


# --- who stops, and what is closed then ---------------------------------------------------------


class Source:
    """Gives words for ever; knows how many were asked for and whether it was closed."""

    def __init__(self, *words: str, then: BaseException | None = None) -> None:
        self._words, self._then = words, then
        self.given = 0
        self.closed = 0

    def __iter__(self) -> Source:
        return self

    def __next__(self) -> str:
        if self._then is not None and self.given == len(self._words):
            raise self._then
        self.given += 1
        return self._words[(self.given - 1) % len(self._words)]

    def close(self) -> None:
        self.closed += 1


class AsyncSource:
    """`Source` for an event loop."""

    def __init__(self, *words: str, then: BaseException | None = None) -> None:
        self.inner = Source(*words, then=then)

    def __aiter__(self) -> AsyncSource:
        return self

    async def __anext__(self) -> str:
        await asyncio.sleep(0)
        return next(self.inner)

    async def aclose(self) -> None:
        self.inner.close()


def test_flagged_stream_asks_for_no_more_and_closes_its_source() -> None:
    source = Source("fine ", "bank ", "fine ")
    with pytest.raises(Blocked):
        list(guard("withhold").stream(source))
    assert (source.given, source.closed) == (2, 1)


def test_source_that_raises_is_heard_and_what_is_held_stays_back() -> None:
    source = Source("one two ", "three ba", then=OSError("line dropped"))
    out: list[str] = []
    with capture() as reports, pytest.raises(OSError, match="line dropped"):
        out.extend(iterate(guard("withhold").stream(source), out))
    assert "".join(out) == "one two thr"  # 13 characters were looked at, the last word left out, 3 held back
    assert [r.action for r in reports] == [Action.ALLOW]
    assert source.closed == 1


def iterate(stream: Iterator[str], out: list[str]) -> list[str]:
    """Adds what comes to `out`, which keeps it when the stream raises."""
    for chunk in stream:
        out.append(chunk)
    return []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1), MemoryError()])
def test_interruption_of_the_source_releases_nothing_more(error: BaseException) -> None:
    out: list[str] = []
    with pytest.raises(type(error)):
        iterate(guard("withhold", 30).stream(Source("three loaves ", then=error)), out)
    assert out == []


def test_interruption_of_a_check_releases_nothing_more() -> None:
    check = FailingCheck(KeyboardInterrupt())
    policy = Policy.from_data({"stream": {"hold_chars": 3, "step_chars": 2}})
    source, out = Source("three ", "loaves ", "are "), list[str]()
    with pytest.raises(KeyboardInterrupt):
        iterate(Guard(outputs=[check], policy=policy).stream(source), out)
    assert (out, source.closed) == ([], 1)


def test_check_that_fails_in_the_middle_is_closed() -> None:
    check = FailingCheck(when=lambda text: "loaves" in text)
    policy = Policy.from_data({"stream": {"hold_chars": 3, "step_chars": 2, "context_chars": 6}})
    source, out = Source("one ", "two ", "three ", "loaves ", "are "), list[str]()
    with pytest.raises(CheckFailed, match="failed with RuntimeError"):
        iterate(Guard(outputs=[check], policy=policy).stream(source), out)
    assert "one" in "".join(out)
    assert "loaves" not in "".join(out)
    assert source.closed == 1


def test_check_that_hangs_in_the_middle_is_closed() -> None:
    check = HangingCheck()
    policy = Policy.from_data({"check_timeout_s": 0.05, "stream": {"hold_chars": 3, "step_chars": 2}})
    source, out = Source("one ", "two ", "three "), list[str]()
    with pytest.raises(CheckTimeout):
        iterate(Guard(outputs=[check], policy=policy).stream(source), out)
    check.release()
    assert (out, source.closed) == ([], 1)


def test_total_time_is_that_of_the_whole_stream() -> None:
    check = SlowCheck()
    policy = Policy.from_data({"total_timeout_s": 0.2, "stream": {"hold_chars": 3, "step_chars": 2}})
    source = Source("one ")
    with pytest.raises(CheckTimeout):
        iterate(Guard(outputs=[check], policy=policy).stream(source), [])
    assert source.given < 30  # each look takes 20 ms


class SlowCheck(WordCheck):
    """Takes 20 ms for a batch."""

    def __call__(self, batch: Any, /) -> Any:
        time.sleep(0.02)
        return super().__call__(batch)


def test_redaction_of_a_stream_is_a_block() -> None:
    policy = Policy.from_data(
        {
            "output": {"text": {"action": "redact"}},
            "stream": {"hold_chars": 8, "step_chars": 2, "context_chars": 8},
        }
    )
    out: list[str] = []
    with pytest.raises(Blocked):
        iterate(Guard(outputs=[WordCheck("bank")], policy=policy).stream(iter("by the river bank ")), out)
    assert "b" not in "".join(out).removeprefix("by")


def test_sentence_that_began_before_the_context_is_found_at_the_end() -> None:
    check = WordCheck("never tell anyone that the old man by the river is hurt")  # 55 characters
    policy = Policy.from_data({"stream": {"hold_chars": 10, "step_chars": 5, "context_chars": 10}})
    text = "he said never tell anyone that the old man by the river is hurt, and so on and on"
    out: list[str] = []
    with pytest.raises(Blocked):
        iterate(Guard(outputs=[check], policy=policy).stream(iter(text)), out)
    assert len("".join(out)) <= len(text) - 10


def test_reader_of_an_async_stream_that_breaks_off_closes_the_source() -> None:
    source = AsyncSource("fine ")

    async def run() -> None:
        stream = guard("withhold").astream(source)
        async for _ in stream:
            break
        await stream.aclose()

    asyncio.run(run())
    assert source.inner.closed == 1


def test_cancelled_reader_closes_the_source_and_releases_nothing_more() -> None:
    out: list[str] = []
    source = AsyncSource("fine ")

    async def read() -> None:
        stream = guard("withhold").astream(source)
        try:
            async for chunk in stream:
                out.append(chunk)
        finally:
            await stream.aclose()

    async def run() -> int:
        task = asyncio.create_task(read())
        while len(out) < 3:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(out)

    assert asyncio.run(run()) == len(out)
    assert source.inner.closed == 1


def test_async_source_that_raises_is_heard() -> None:
    source = AsyncSource("three ba", then=OSError("line dropped"))

    async def run() -> None:
        async for _ in guard("withhold", 30).astream(source):
            pytest.fail("nothing may leave")

    with pytest.raises(OSError, match="line dropped"):
        asyncio.run(run())
    assert source.inner.closed == 1


def test_iterator_and_the_response_that_gave_it_are_both_closed() -> None:
    closed: list[str] = []

    class Response:
        def __iter__(self) -> Iterator[str]:
            try:
                while True:
                    yield "bank "
            finally:
                closed.append("iterator")

        def close(self) -> None:
            closed.append("response")

    with pytest.raises(Blocked):
        list(guard("withhold").stream(Response()))
    assert closed == ["iterator", "response"]


def test_streams_of_many_threads_and_tasks_share_nothing() -> None:
    shared = guard("withhold")
    texts = [f"number {i} " + ("bank " if i % 3 == 0 else "loaf ") + f"and tea {i} " * 5 for i in range(24)]

    def one(text: str) -> str | None:
        try:
            return "".join(shared.stream(iter(text)))
        except Blocked:
            return None

    async def several() -> list[str | None]:
        return list(await asyncio.gather(*(atask(text) for text in texts)))

    async def atask(text: str) -> str | None:
        async def source() -> AsyncIterator[str]:
            for i in range(0, len(text), 9):
                await asyncio.sleep(0)
                yield text[i : i + 9]

        try:
            return "".join([chunk async for chunk in shared.astream(source())])
        except Blocked:
            return None

    wanted = [None if "bank" in text else text for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, texts)) == wanted
    assert asyncio.run(several()) == wanted


def test_streams_read_in_turns_share_nothing() -> None:
    shared = guard("withhold")
    first, second = shared.stream(iter("a ba" * 9)), shared.stream(iter("nk loaf " * 9))
    out: list[list[str]] = [[], []]
    for one, other in zip_longest(first, second, fillvalue=""):
        out[0].append(one)
        out[1].append(other)
    assert ("".join(out[0]), "".join(out[1])) == ("a ba" * 9, "nk loaf " * 9)


def test_what_is_sent_into_a_guarded_stream_changes_nothing() -> None:
    stream = guard("withhold").stream(iter(["all is well. "] * 9))
    out = next(stream) + stream.send("bank") + "".join(stream)  # type: ignore[arg-type]  # what nobody may send
    assert out == "all is well. " * 9
