"""Chunk objects of chat streams: each text in them is held back, and they go on whole and in order."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from safeguard import Blocked, Guard, Policy, UnseenInput, capture
from safeguard.chunks import JsonText, Unreadable, read_chunk
from safeguard.testing import WordCheck

RULES = {"stream": {"hold_chars": 10, "step_chars": 5, "context_chars": 20}}


def guard(*words: str, **policy: Any) -> Guard:
    return Guard(
        [WordCheck("knife")], [WordCheck(*(words or ("blood",)))], policy=Policy.from_data(RULES | policy)
    )


def said(text: Any, index: int = 0, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {"content": text, **delta}, "finish_reason": None}]}


def words(text: str) -> list[str]:
    return text.split()


def ended(index: int = 0, reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {}, "finish_reason": reason}]}


def as_object(value: Any) -> Any:
    if isinstance(value, dict):
        return SimpleNamespace(**{name: as_object(part) for name, part in value.items()})
    return [as_object(part) for part in value] if isinstance(value, list) else value


def content(chunks: list[Any]) -> str:
    return "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk["choices"])


def collect(chunks: Any, guard: Guard) -> tuple[list[Any], Blocked | None]:
    out: list[Any] = []
    try:
        for chunk in guard.stream(chunks):
            out.append(chunk)
    except Blocked as exc:
        return out, exc
    return out, None


def test_clean_chunks_come_through_as_they_are_and_in_order() -> None:
    chunks = [
        said("", role="assistant"),
        *(said(word + " ") for word in words("the quick brown fox jumps over the lazy dog")),
        ended(),
        {"choices": [], "usage": {"total_tokens": 9}},
    ]
    before = copy.deepcopy(chunks)
    out, _ = collect(iter(chunks), guard())
    assert [id(chunk) for chunk in out] == [id(chunk) for chunk in chunks]
    assert chunks == before


def test_objects_are_read_like_mappings() -> None:
    chunks = [as_object(said(text)) for text in ("a long day, ", "and then there was bl", "ood")]
    out, error = collect(iter(chunks), guard())
    assert error is not None
    assert out == chunks[:1]


def test_word_split_over_chunks_is_never_released() -> None:
    out, error = collect((said(letter) for letter in "a quiet evening, then blood on the floor"), guard())
    assert error is not None
    assert "a quiet evening, then ".startswith(content(out))
    assert content(out) != ""


def test_role_only_chunk_goes_on_at_once() -> None:
    stream = guard().stream(iter([said(None, role="assistant"), said("hello")]))
    assert next(stream) == said(None, role="assistant")


def test_each_choice_is_a_text_of_its_own() -> None:
    # together the two would read "blood"
    chunks = [said("bl", 0), said("ood", 1), said("ue", 0), said(" flour", 1)]
    out, error = collect(iter(chunks), guard())
    assert (out, error) == (chunks, None)


def test_flagged_choice_stops_the_stream_and_each_choice_has_its_report() -> None:
    def chunks() -> Iterator[Any]:
        for word in words("the sun is up and all the birds sing"):
            yield said(word + " ", 0)
            yield said("blood " if word == "birds" else "fine ", 1)

    out, error = collect(chunks(), guard())
    assert error is not None
    assert [r.blocked for r in error.reports] == [False, True]
    assert "blood" not in content(out)


def test_several_choices_in_one_chunk_are_all_read() -> None:
    chunk = {"choices": [*said("fine", 0)["choices"], *said("blood", 1)["choices"]]}
    out, error = collect(iter([chunk]), guard())
    assert (out, error is not None) == ([], True)


def test_end_of_one_choice_lets_the_others_go_on() -> None:
    chunks = [said("yes", 0), ended(0), *(said(word + " ", 1) for word in words("and so on and on"))]
    stream = guard().stream(iter(chunks))
    assert [next(stream), next(stream)] == chunks[:2]


def test_text_after_the_end_of_its_choice_is_closed() -> None:
    with pytest.raises(UnseenInput, match="must not go on after its finish_reason"):
        list(guard().stream(iter([said("yes"), ended(), said("more")])))


@pytest.mark.parametrize("part", ["refusal", "reasoning_content", "reasoning"])
def test_other_words_of_a_delta_are_judged(part: str) -> None:
    chunks = [said(None, 0, **{part: "bl"}), said(None, 0, **{part: "ood"})]
    out, error = collect(iter(chunks), guard())
    assert (out, error is not None) == ([], True)


def call(arguments: str, name: str | None = None) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return said(None, tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": function}])


def test_arguments_of_a_tool_call_are_judged_over_chunks() -> None:
    out, error = collect(iter([call("", "search"), call('{"q": "bl'), call('ood"}')]), guard())
    assert error is not None
    assert out == [call("", "search")][: len(out)]


def test_escapes_in_arguments_hide_nothing() -> None:
    out, error = collect((call(letter) for letter in r'{"q": "bl\u006f\u006fd"}'), guard())
    assert (out, error is not None) == ([], True)


def test_harmless_tool_call_comes_through() -> None:
    chunks = [call("", "search"), call('{"q": "bre'), call('ad \\u00e9"}'), ended(reason="tool_calls")]
    assert collect(iter(chunks), guard()) == (chunks, None)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12), st.integers(1, 7))
def test_escapes_are_undone_wherever_they_are_cut(text: str, size: int) -> None:
    written = "".join(
        f"\\u{int.from_bytes(unit, 'big'):04x}"
        for c in text
        for unit in (c.encode("utf-16-be")[i : i + 2] for i in range(0, len(c.encode("utf-16-be")), 2))
    )
    read = JsonText()
    assert "".join(read(written[i : i + size]) for i in range(0, len(written), size)) + read.end() == text


def test_escaped_backslash_does_not_begin_another_escape() -> None:
    read = JsonText()
    assert read("a\\") + read("\\u0062") + read.end() == "a\\u0062"


@pytest.mark.parametrize(
    "chunk",
    [
        said(None, audio={"data": "AAAA"}),
        said(None, unheard_of="a text that no check has seen"),
        said(None, role="blood " * 60),
        said(None, tool_calls="blood"),
        said(None, tool_calls=[{"index": 0, "custom": {"input": "blood"}}]),
        said(None, function_call={"name": "f", "body": "blood"}),
        {"choices": [{"index": "0", "delta": {"content": "x"}}]},
        {"choices": [{"index": 0, "message": {"content": "blood"}}]},
        {"choices": [{"index": 0, "delta": {"content": b"blood"}}]},
        {"choices": [{"index": 0, "delta": {"content": [{"type": "image_url", "image_url": "x"}]}}]},
        {"choices": [{"index": 0, "delta": {"content": "x"}, "note": "blood " * 60}]},
        {"choices": [{"index": 0, "delta": 7}]},
        {"choices": {"0": "blood"}},
        {"choices": None},
        {"type": "content_block_delta", "delta": {"text": "blood"}},
    ],
    ids=str,
)
def test_chunk_that_cannot_be_read_is_closed(chunk: Any) -> None:
    source = iter([said("fine so far, and on it goes "), chunk, said("never read")])
    with pytest.raises(UnseenInput):
        list(guard().stream(source))
    assert list(source) == [said("never read")]


@pytest.mark.parametrize("first", ["text", b"bytes", 7, None, {"text": "x"}])
def test_streams_of_two_kinds_are_closed(first: Any) -> None:
    with pytest.raises(UnseenInput, match="a stream must give text, got"):
        list(guard().stream(iter([first, said("fine")])))


def test_string_among_chunk_objects_is_closed() -> None:
    with pytest.raises(UnseenInput, match="a stream must give text, got str, or chunks with choices"):
        list(guard().stream(iter([said("fine"), "text"])))


def test_chunk_that_is_let_through_unread_keeps_its_place() -> None:
    chunks = [said("fine "), said(None, audio={"data": "AAAA"}), said("day"), ended()]
    with capture() as reports:
        out = list(guard(on_error="allow").stream(iter(chunks)))
    assert out == chunks
    assert "audio" in str(reports[0].verdicts[0].error)


def test_text_of_the_completions_api_and_content_in_parts_are_read() -> None:
    assert read_chunk({"choices": [{"index": 1, "text": "a"}]}).added == [((1, "content"), "a")]
    parts = [{"type": "text", "text": "a"}, "b"]
    assert read_chunk(said(parts)).added == [((0, "content"), "ab")]


def test_words_in_a_property_are_read() -> None:
    class Delta:
        @property
        def content(self) -> str:
            return "blood"

    chunk = SimpleNamespace(choices=[SimpleNamespace(index=0, delta=Delta(), finish_reason=None)])
    assert read_chunk(chunk).added == [((0, "content"), "blood")]


def test_words_beyond_the_fields_of_a_model_are_not_overlooked() -> None:
    class Delta(BaseModel):
        model_config = ConfigDict(extra="allow")
        content: str | None = None

    class Choice(BaseModel):
        index: int
        delta: Delta
        finish_reason: str | None = None

    chunk = SimpleNamespace(choices=[Choice(index=0, delta=Delta(reasoning="blood"))])
    assert read_chunk(chunk).added == [((0, "reasoning"), "blood")]
    with pytest.raises(Unreadable, match="a chunk's thoughts cannot be seen"):
        read_chunk(SimpleNamespace(choices=[Choice(index=0, delta=Delta(thoughts="blood"))]))


def test_chunks_of_the_hubs_client_are_read() -> None:
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed")
    delta = hub.ChatCompletionStreamOutputDelta(role="assistant", content="blood")
    choice = hub.ChatCompletionStreamOutputChoice(delta=delta, index=0)
    chunk = hub.ChatCompletionStreamOutput(
        choices=[choice], created=0, id="x", model="m", system_fingerprint=""
    )
    assert read_chunk(chunk).added == [((0, "content"), "blood")]


def test_replaced_stream_ends_with_a_chunk_of_its_kind() -> None:
    policy = {"on_block": "replace", "placeholder_text": "(cut)"}
    (tail,) = guard(**policy).stream(iter([said("bl"), said("ood", logprobs=None)]))
    assert tail["choices"][0]["delta"]["content"] == "(cut)"
    assert tail["choices"][0]["finish_reason"] == "content_filter"
    (tail,) = guard(**policy).stream(iter([as_object(said("blood"))]))
    assert tail.choices[0].delta.content == "(cut)"


def test_end_of_a_blocked_stream_says_nothing_of_what_was_withheld() -> None:
    last = said("blood", refusal="more blood")
    last["choices"][0]["logprobs"] = {"content": [{"token": "blood"}]}
    (tail,) = guard(on_block="replace", placeholder_text="(cut)").stream(iter([last]))
    assert "blood" not in str(tail)


def test_endless_chunks_without_text_are_closed() -> None:
    held = iter([said("held"), *({"choices": list[Any]()} for _ in range(10_000))])
    with pytest.raises(UnseenInput, match="more than max_chars 50 chunks"):
        list(guard(max_chars=50).stream(held))


def test_too_many_texts_in_one_stream_are_closed() -> None:
    with pytest.raises(UnseenInput, match="more than max_items 5 texts"):
        list(guard(max_items=5).stream(said("x", index) for index in range(9)))


def test_function_that_gives_back_a_stream_is_guarded() -> None:
    closed: list[bool] = []

    class Response:
        """As clients give it: to iterate, and to close."""

        def __iter__(self) -> Iterator[Any]:
            yield from (said(word + " ") for word in words("one two three four blood six"))

        def close(self) -> None:
            closed.append(True)

    def chat(prompt: str) -> Response:
        return Response()

    answer: Any = guard()(chat, stream=True)
    out: list[Any] = []
    with pytest.raises(Blocked):
        out.extend(answer("hello"))
    assert "blood" not in content(out)
    assert closed == [True]
    with pytest.raises(Blocked):
        list(answer("a knife"))
    assert closed == [True]  # nothing was opened


def test_coroutine_that_gives_back_an_async_stream_is_guarded() -> None:
    closed: list[bool] = []

    class Response:
        """As async clients give it: `close` is a coroutine function, and there is no `aclose`."""

        async def __aiter__(self) -> AsyncIterator[Any]:
            for word in words("one two three four blood six"):
                yield said(word + " ")

        async def close(self) -> None:
            closed.append(True)

    async def chat(prompt: str) -> Response:
        return Response()

    async def run() -> list[Any]:
        answer: Any = guard()(chat, stream=True)
        out: list[Any] = []
        try:
            async for chunk in await answer("hello"):
                out.append(chunk)
        except Blocked:
            return out
        pytest.fail("the stream was not stopped")

    assert "blood" not in content(asyncio.run(run()))
    assert closed == [True]


def test_reader_of_the_users_finds_the_text_of_other_chunks() -> None:
    def chat(prompt: str) -> Iterator[Any]:
        yield {"kind": "start"}
        yield from ({"kind": "text", "words": word} for word in ("fine ", "and ", "well ", "bl", "ood "))

    answer: Any = guard()(chat, output=lambda chunk: chunk.get("words"))
    out: list[Any] = []
    with pytest.raises(Blocked):
        out.extend(answer("hello"))
    assert out[0] == {"kind": "start"}
    assert "bl" not in [chunk.get("words") for chunk in out]


def test_reader_that_fails_on_a_chunk_closes_the_stream() -> None:
    def chat(prompt: str) -> Iterator[Any]:
        yield {"other": "blood"}

    answer: Any = guard()(chat, output=lambda chunk: chunk["words"])
    with pytest.raises(UnseenInput, match=r"output cannot be read \(KeyError\)"):
        list(answer("hello"))


def test_streamed_pictures_are_refused_when_wrapped() -> None:
    with pytest.raises(ValueError, match="only text can be streamed"):
        guard()(lambda prompt: prompt, stream=True, task="t2i")


BESIDE = {"note": "some blood", "nested": {"deep": [{"text": "some blood"}]}, "key": {"some blood": 1}}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("place", ["chunk", "choice"])
def test_words_beside_the_text_of_a_chunk_are_judged(name: str, place: str) -> None:
    chunk = said("fine")
    (chunk if place == "chunk" else chunk["choices"][0])[name] = BESIDE[name]
    out, error = collect(iter([chunk, said("fine")]), guard())
    assert (out, error is not None) == ([], True)


@pytest.mark.parametrize(
    "delta",
    [{"role": "some blood"}, {"name": "some blood"}, {"tool_calls": [{"index": 0, "id": "some blood"}]}],
)
def test_words_in_the_place_of_a_name_are_judged(delta: dict[str, Any]) -> None:
    out, error = collect(iter([said("fine", **delta)]), guard())
    assert (out, error is not None) == ([], True)


def test_words_that_stand_beside_every_chunk_are_judged_once_and_hold_nothing_back() -> None:
    check = WordCheck("blood")
    chunks = [
        {**said(word + " "), "provider": "Some Cloud"} for word in words("the sun is up and all is well")
    ]
    stream = Guard(outputs=[check], policy=Policy.from_data(RULES)).stream(iter(chunks))
    next(stream)
    stream.close()
    assert check.seen.count("Some Cloud") == 1


def test_too_many_texts_beside_a_stream_are_closed() -> None:
    policy = Policy.from_data(RULES | {"max_items": 2})
    chunk = {**said("fine"), **{f"n{i}": "two words" for i in range(4)}}
    with pytest.raises(UnseenInput, match="more than max_items 2 texts in a stream"):
        list(Guard(outputs=[WordCheck("blood")], policy=policy).stream(iter([chunk])))


def test_chunk_that_was_changed_while_it_was_held_is_closed() -> None:
    def chunks() -> Iterator[Any]:
        chunk = said("")  # one object, written to again and again
        for word in words("the sun is up and all the birds sing"):
            chunk["choices"][0]["delta"]["content"] = word + " "
            yield chunk

    with pytest.raises(UnseenInput, match="a chunk was changed after it was given"):
        list(guard().stream(chunks()))


def test_key_that_is_a_text_is_not_said_in_the_error() -> None:
    with pytest.raises(UnseenInput, match="a chunk's part cannot be seen") as info:
        list(guard().stream(iter([said("fine", 0, **{"some blood": "fine"})])))
    assert "blood" not in str(info.value)


def test_placeholder_keeps_nothing_that_stood_beside_the_flagged_text() -> None:
    last = {**said("blood "), "x": {"t": "blood"}, "id": "c1"}
    last["choices"][0]["meta"] = {"t": "blood"}
    out, _ = collect(iter([last]), guard(on_block="replace", placeholder_text="-"))
    assert "blood" not in str(out)
    assert (out[0]["id"], content(out)) == ("c1", "-")


def test_placeholder_of_an_object_keeps_nothing_that_it_keeps_to_itself() -> None:
    last = as_object(said("blood "))
    last.choices[0].delta._raw = "blood"
    out, _ = collect(iter([last]), guard(on_block="replace", placeholder_text="-"))
    assert (out[0].choices[0].delta.content, out[0].choices[0].delta._raw) == ("-", None)
