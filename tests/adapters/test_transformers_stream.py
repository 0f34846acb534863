"""Tokens reach the caller's streamer only after their text was judged, and a flagged stream ends upstream."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AsyncTextIteratorStreamer, LlamaForCausalLM, TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import safeguard
from safeguard import Blocked, CheckFailed, Guard, Policy
from safeguard.policy import StreamRules
from safeguard.testing import FailingCheck, SwapRefiner, WordCheck
from tests.adapters.tiny_lm import Script, asked, tiny_llama, tiny_tokenizer

TOK = tiny_tokenizer()
SHORT = StreamRules(hold_chars=6, step_chars=3, context_chars=20)


class Tokens(BaseStreamer):  # type: ignore[misc]
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended += 1

    @property
    def text(self) -> str:
        return str(TOK.decode(self.ids, skip_special_tokens=True))


def guarded(*, refiner: Any = None, outputs: Any = None, stream: StreamRules = SHORT, **policy: Any) -> Any:
    guard = Guard(
        [WordCheck("knife")], outputs or [WordCheck("blood")], refiner, Policy(stream=stream, **policy)
    )
    return guard(tiny_llama(TOK), tokenizer=TOK)


def generate(model: Any, prompt: str, answer: str, streamer: Any, **how: Any) -> Any:
    how = {"max_new_tokens": 300, "do_sample": False, "logits_processor": [Script(TOK, {"?": answer})]} | how
    return model.generate(**asked(TOK, prompt), streamer=streamer, **how)


def test_harmless_stream_arrives_whole_and_in_order() -> None:
    streamer = Tokens()
    output = generate(guarded(), "why?", "the sun is up and the birds sing", streamer)
    assert streamer.text == "why?the sun is up and the birds sing"
    assert streamer.ids == output[0].tolist()
    assert streamer.ended == 1


def test_word_split_over_tokens_is_never_released() -> None:
    streamer = Tokens()
    with pytest.raises(Blocked):
        generate(guarded(), "why?", "a quiet evening, then blood on the floor", streamer)
    assert "why?a quiet".startswith(streamer.text[:6])
    assert "b" not in streamer.text
    assert streamer.ended == 1


def test_flagged_stream_stops_the_model() -> None:
    script = Script(TOK, {"?": "blood " + "x" * 200})
    with pytest.raises(Blocked):
        generate(guarded(), "why?", "", Tokens(), logits_processor=[script])
    assert script.steps < 20  # the word ends at token 5 and is scored at a multiple of 3 characters


def test_callers_own_stopping_criteria_still_count() -> None:
    streamer = Tokens()
    generate(
        guarded(), "why?", "abcdefghij", streamer, stopping_criteria=[lambda ids, scores: ids.shape[1] >= 7]
    )
    assert streamer.text == "why?abc"


def test_end_of_the_stream_is_judged() -> None:
    streamer = Tokens()
    with pytest.raises(Blocked) as caught:
        generate(guarded(stream=StreamRules()), "why?", "so much blood", streamer)
    assert streamer.text == "why?"
    assert TOK.batch_decode(caught.value.output, skip_special_tokens=True) == ["why?"]


def test_refused_prompt_ends_the_stream_so_that_nobody_waits() -> None:
    streamer = TextIteratorStreamer(TOK, timeout=10)
    with pytest.raises(Blocked):
        generate(guarded(), "a knife?", "fine", streamer)
    assert list(streamer) == [""]


def test_refused_prompt_streams_the_placeholder_where_the_policy_replaces() -> None:
    streamer = Tokens()
    generate(guarded(on_block="replace", placeholder_text="no"), "a knife?", "fine", streamer)
    assert (streamer.text, streamer.ended) == ("a knife?no", 1)


def test_blocked_stream_ends_with_the_placeholder_where_the_policy_replaces() -> None:
    streamer = Tokens()
    output = generate(guarded(on_block="replace", placeholder_text="(cut)"), "why?", "blood", streamer)
    assert streamer.text == "why?(cut)"
    assert TOK.batch_decode(output, skip_special_tokens=True) == ["why?(cut)"]


def test_thread_that_reads_the_stream_gets_its_text_and_its_end() -> None:
    streamer = TextIteratorStreamer(TOK, skip_prompt=True, skip_special_tokens=True, timeout=10)
    model = guarded()
    thread = threading.Thread(target=generate, args=(model, "why?", "the sun is up", streamer))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == "the sun is up"


def test_async_reader_gets_its_text_and_its_end() -> None:
    async def read() -> str:
        streamer = AsyncTextIteratorStreamer(TOK, skip_prompt=True, skip_special_tokens=True, timeout=10)
        work = asyncio.create_task(asyncio.to_thread(generate, guarded(), "why?", "the sun is up", streamer))
        text = "".join([piece async for piece in streamer])
        await work
        return text

    assert asyncio.run(read()) == "the sun is up"


def test_printing_streamer_prints_nothing_that_was_withheld(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Blocked):
        generate(guarded(), "why?", "one two three four blood", TextStreamer(TOK, skip_prompt=True))
    assert "blo" not in capsys.readouterr().out


def test_text_is_held_until_enough_came_behind_it() -> None:
    streamer = Tokens()
    seen: list[tuple[int, int]] = []  # characters made, characters released

    def watch(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        seen.append((ids.shape[1] - 4, len(streamer.text) - 4))
        return torch.zeros(1, dtype=torch.bool)

    generate(guarded(), "why?", "abcdefghijklmnopqrstuvwxyz", streamer, stopping_criteria=[watch])
    assert max(released for _, released in seen) > 10
    # a token is streamed after the criteria ran on it, so one more may stand there
    assert all(made - released >= SHORT.hold_chars for made, released in seen if released)


def test_tokens_that_come_several_at_a_time_are_held_back_too() -> None:
    streamer = Tokens()
    with pytest.raises(Blocked):
        generate(guarded(), "why?", "tick tick tick tick tick blood", streamer, prompt_lookup_num_tokens=4)
    assert streamer.text.startswith("why?tick")
    assert "b" not in streamer.text


def test_sentence_mode_releases_whole_sentences() -> None:
    streamer = Tokens()
    with pytest.raises(Blocked):
        generate(
            guarded(stream=StreamRules(mode="sentence", step_chars=1)),
            "why?",
            "One day. Then blood.",
            streamer,
        )
    assert streamer.text == "why?One day. "


def test_shadow_mode_releases_at_once_and_blocks_at_the_end() -> None:
    streamer = Tokens()
    with pytest.raises(Blocked):
        generate(guarded(stream=StreamRules(mode="shadow")), "why?", "blood", streamer)
    assert streamer.text == "why?blood"


def test_refined_prompt_streams_its_answer_after_the_prompt_as_given() -> None:
    streamer = Tokens()
    model = guarded(refiner=SwapRefiner({"knife": "spoon"}), input={"llm": {"action": "refine"}})
    with safeguard.capture() as reports:
        generate(model, "a knife?", "fine", streamer)
    assert streamer.text == "a knife?fine"
    assert reports[0].revised_prompt == "a spoon?"


def test_characters_of_several_tokens_arrive_whole() -> None:
    streamer = TextIteratorStreamer(TOK, skip_prompt=True, skip_special_tokens=True, timeout=10)
    generate(guarded(), "why?", "日本語 and ünïcödé 🎈 again", streamer)
    assert "".join(streamer) == "日本語 and ünïcödé 🎈 again"


def test_check_that_fails_ends_the_stream_closed() -> None:
    streamer = Tokens()
    with pytest.raises(CheckFailed):
        generate(guarded(outputs=[FailingCheck()]), "why?", "the sun is up", streamer)
    assert (streamer.text, streamer.ended) == ("why?", 1)


def test_generation_that_raises_ends_the_stream() -> None:
    def fail(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    streamer = Tokens()
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(guarded(), "why?", "", streamer, logits_processor=[fail])
    assert streamer.ended == 1


def test_batch_with_a_streamer_is_refused() -> None:
    with pytest.raises(ValueError, match="one prompt and one sequence, got 2 prompts x 1"):
        guarded().generate(**asked(TOK, "a?", "b?"), streamer=Tokens())


class Own(LlamaForCausalLM):  # type: ignore[misc]
    """A model with a generate() of its own, as remote code has it: streams one thing and returns another."""

    streams_prompt = True

    def generate(self, input_ids: torch.Tensor, streamer: Any, **kwargs: Any) -> torch.Tensor:
        if self.streams_prompt:
            streamer.put(input_ids)
        streamer.put(TOK("fine" if self.streams_prompt else "blood", return_tensors="pt")["input_ids"][0])
        return torch.cat([input_ids, TOK("blood", return_tensors="pt")["input_ids"]], dim=1)


def own(*, streams_prompt: bool) -> Any:
    model = tiny_llama(TOK, Own)
    model.streams_prompt = streams_prompt
    return Guard(outputs=[WordCheck("blood")])(model, tokenizer=TOK)


def test_model_that_streams_one_thing_and_returns_another_is_judged_on_both() -> None:
    with pytest.raises(Blocked):
        own(streams_prompt=True).generate(asked(TOK, "why?")["input_ids"], Tokens())


def test_model_that_streams_no_prompt_is_judged_from_its_first_token() -> None:
    streamer = Tokens()
    with pytest.raises(Blocked):
        own(streams_prompt=False).generate(asked(TOK, "why?")["input_ids"], streamer)
    assert (streamer.text, streamer.ended) == ("", 1)


def test_streams_at_the_same_time_share_nothing() -> None:
    model = guarded()
    texts = {"a?": "the first goes on and on", "b?": "blood", "c?": "the third is short"}
    got: dict[str, str] = {}

    def work(prompt: str) -> None:
        streamer = Tokens()
        try:
            generate(model, prompt, texts[prompt], streamer)
        except Blocked:
            got[prompt] = "blocked " + streamer.text
        else:
            got[prompt] = streamer.text

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {"a?": "a?" + texts["a?"], "b?": "blocked b?", "c?": "c?" + texts["c?"]}


@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet="blod xé語", max_size=30), step=st.integers(1, 9), hold=st.integers(4, 12))
def test_streamed_verdict_is_the_unstreamed_one_and_no_flagged_letter_leaves(
    text: str, step: int, hold: int
) -> None:
    rules = StreamRules(hold_chars=hold, step_chars=step, context_chars=8)
    model = guarded(stream=rules, on_block="replace")
    streamer = Tokens()
    with safeguard.capture() as reports:
        generate(model, "why?", text, streamer)
    assert reports[0].blocked == ("blood" in text)
    released = streamer.text.removeprefix("why?")
    assert text.startswith(released)
    assert released == text if not reports[0].blocked else len(released) <= text.index("blood")


def test_flagged_text_ends_the_iteration_of_its_reader_and_the_thread() -> None:
    streamer = TextIteratorStreamer(TOK, skip_prompt=True, skip_special_tokens=True, timeout=10)
    script = Script(TOK, {"?": "tick tock, blood " + "x" * 200})
    caught: list[BaseException] = []

    def work() -> None:
        try:
            generate(guarded(), "why?", "", streamer, logits_processor=[script])
        except Blocked as exc:
            caught.append(exc)

    thread = threading.Thread(target=work)
    thread.start()
    text = "".join(streamer)
    thread.join(10)
    assert "tick tock, ".startswith(text)
    assert (len(caught), thread.is_alive()) == (1, False)
    assert script.steps < 60  # of 217: the word ends at 16, and a look comes within a word of 40 letters


def test_flagged_text_ends_the_iteration_of_an_async_reader() -> None:
    async def read() -> tuple[str, bool]:
        streamer = AsyncTextIteratorStreamer(TOK, skip_prompt=True, skip_special_tokens=True, timeout=10)
        call = asyncio.to_thread(generate, guarded(), "why?", "tick tock, blood and more", streamer)
        work = asyncio.create_task(call)
        text = "".join([piece async for piece in streamer])
        try:
            await work
        except Blocked:
            return text, True
        return text, False

    text, blocked = asyncio.run(read())
    assert "tick tock, ".startswith(text)
    assert blocked


def test_streamer_that_gives_up_ends_the_generation() -> None:
    class Gone(Tokens):
        def put(self, value: torch.Tensor) -> None:
            super().put(value)
            if len(self.ids) > 10:
                raise BrokenPipeError("the reader left")

    script = Script(TOK, {"?": "the sun is up " * 20})
    with pytest.raises(BrokenPipeError):
        generate(guarded(), "why?", "", Gone(), logits_processor=[script])
    assert script.steps < 40


def test_long_stream_without_a_sentence_is_not_looked_at_again_and_again() -> None:
    streamer = Tokens()
    check = WordCheck("blood")
    model = guarded(outputs=[check], stream=StreamRules(mode="sentence", step_chars=1, context_chars=8))
    generate(model, "why?", "tick " * 50, streamer)
    assert streamer.text == "why?" + "tick " * 50
    assert len(check.seen) == 1  # at the end
