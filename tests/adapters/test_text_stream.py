"""A call of `generate()` read as text: what is raised reaches the reader, and leaving cancels the call."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor

import safeguard
from safeguard import Blocked, Guard, Policy
from safeguard.adapters.text_stream import TextStream
from safeguard.policy import StreamRules
from safeguard.testing import WordCheck
from tests.adapters.tiny_lm import Script, asked, tiny_llama, tiny_tokenizer

TOK = tiny_tokenizer()
SHORT = StreamRules(hold_chars=6, step_chars=3, context_chars=20)
LONG = "the sun is up and the birds sing " * 20


def model() -> Any:
    guard = Guard([WordCheck("knife")], [WordCheck("blood")], policy=Policy(stream=SHORT))
    return guard(tiny_llama(TOK), tokenizer=TOK)


def stream(answer: str, prompt: str = "why?", **how: Any) -> tuple[TextStream, Script]:
    script = Script(TOK, {"?": answer})
    inputs: dict[str, Any] = {"max_new_tokens": 900, "do_sample": False, "logits_processor": [script]} | how
    return TextStream(model(), TOK, **asked(TOK, prompt), **inputs), script


def alive() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "safeguard-stream"]


def test_text_comes_through_whole() -> None:
    text, _ = stream("the sun is up")
    assert "".join(text) == "the sun is up"
    assert alive() == []


def test_block_reaches_the_reader_after_what_was_released() -> None:
    text, _ = stream("tick tock tick tock, blood and more")
    assert next(text) != ""
    with pytest.raises(Blocked):
        assert "blo" not in "".join(text)


def test_refused_prompt_reaches_the_reader() -> None:
    text, script = stream("fine", "a knife?")
    with pytest.raises(Blocked):
        list(text)
    assert script.steps == 0


def test_error_before_the_first_token_reaches_the_reader() -> None:
    text, _ = stream("fine", no_such_argument=1)
    with pytest.raises(ValueError, match="no_such_argument"):
        list(text)


def test_reader_that_leaves_cancels_the_call_and_leaves_no_thread() -> None:
    text, script = stream(LONG)
    with text:
        next(text)
    assert alive() == []
    assert script.steps < len(LONG)  # one letter a step


def test_callers_own_criteria_still_count() -> None:
    text, _ = stream("abcdefghij", stopping_criteria=[lambda ids, scores: ids.shape[1] >= 7])
    assert "".join(text) == "abc"


def test_reports_go_to_the_capture_of_the_reader() -> None:
    with safeguard.capture() as reports:
        text, _ = stream("the sun is up")
        list(text)
    assert len(reports) == 1


def test_async_reader_gets_the_text_and_the_block() -> None:
    async def read(answer: str) -> str:
        text, _ = stream(answer)
        async with text:
            return "".join([piece async for piece in text])

    assert asyncio.run(read("the sun is up")) == "the sun is up"
    with pytest.raises(Blocked):
        asyncio.run(read("so much blood"))


def test_cancelled_reader_cancels_the_call_and_leaves_no_thread() -> None:
    started = threading.Event()

    class Slow(LogitsProcessor):  # type: ignore[misc]  # transformers is untyped here
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            started.set()
            return scores

    async def read() -> None:
        text, _ = stream(LONG, logits_processor=[Slow()])
        async with text:
            async for _ in text:
                await asyncio.sleep(0)

    async def run() -> None:
        task = asyncio.create_task(read())
        await asyncio.to_thread(started.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert alive() == []


def test_wait_that_is_too_long_is_an_error() -> None:
    go = threading.Event()

    def hold(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        go.wait(10)
        return torch.zeros(ids.shape[0], dtype=torch.bool)

    text, _ = stream("the sun is up", stopping_criteria=[hold], timeout_s=0.05)
    with pytest.raises(TimeoutError, match=r"no text came for 0\.05 s"):
        next(text)
    go.set()
    text.close()
    assert alive() == []
