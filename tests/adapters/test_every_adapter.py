"""The table that every adapter must pass: a new adapter gets a row in CASES."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from safeguard import Action, Blocked, CheckFailed, Guard, Policy, UnseenInput, capture
from safeguard.testing import BrightCheck, FailingCheck, ScoreCheck, WordCheck
from tests.adapters.painter import Painter
from tests.adapters.tiny_lm import Script, asked, tiny_llama, tiny_tokenizer

SAFE, UNSAFE, UNSAFE_RESULT = "hello?", "a knife?", "white blood?"
"""A harmless prompt, one that the input check flags, and one whose result the output check flags."""


@dataclass(frozen=True)
class Case:
    """A kind of target: `make` gives it and the list of prompts that reach it, `call` runs it once."""

    name: str
    make: Callable[[], tuple[Any, list[str]]]
    call: Callable[[Any, Any], Any]
    how: dict[str, Any]


def _function() -> tuple[Any, list[str]]:
    seen: list[str] = []

    def echo(prompt: str) -> str:
        seen.append(prompt)
        return prompt

    return echo, seen


def _coroutine() -> tuple[Any, list[str]]:
    seen: list[str] = []

    async def echo(prompt: str) -> str:
        seen.append(prompt)
        return prompt

    return echo, seen


def _generator() -> tuple[Any, list[str]]:
    seen: list[str] = []

    def echo(prompt: str) -> Iterator[str]:
        seen.append(prompt)
        yield from prompt

    return echo, seen


def _async_generator() -> tuple[Any, list[str]]:
    seen: list[str] = []

    async def echo(prompt: str) -> AsyncIterator[str]:
        seen.append(prompt)
        for letter in prompt:
            yield letter

    return echo, seen


def _painter() -> tuple[Any, list[str]]:
    pipe = Painter()
    pipe.set_progress_bar_config(disable=True)
    return pipe, pipe.calls  # type: ignore[return-value]  # one entry a call, whatever it holds


TOKENIZER = tiny_tokenizer()
SCRIPT = {"blood": "blood", "hello": "hello", "knife": "knife"}


def _model() -> tuple[Any, list[str]]:
    model = tiny_llama(TOKENIZER)
    model.script = Script(TOKENIZER, SCRIPT)
    return model, model.script.prompts


def _text_pipeline() -> tuple[Any, list[str]]:
    from transformers import TextGenerationPipeline

    model = tiny_llama(TOKENIZER)
    pipe = TextGenerationPipeline(model=model, tokenizer=tiny_tokenizer())
    pipe.script = Script(TOKENIZER, SCRIPT)
    return pipe, pipe.script.prompts


def _generate(model: Any, prompt: Any) -> str:
    inputs = asked(TOKENIZER, prompt) if isinstance(prompt, str) else {"inputs_embeds": prompt}
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False, logits_processor=[model.script])
    return str(TOKENIZER.decode(out[0], skip_special_tokens=True))


def _run_pipeline(pipe: Any, prompt: Any) -> str:
    records = pipe(prompt, max_new_tokens=20, do_sample=False, logits_processor=[pipe.script])
    return str(records[0]["generated_text"])


def _paint(pipe: Any, prompt: Any) -> Any:
    return pipe(prompt=prompt) if isinstance(prompt, str) else pipe(prompt_embeds=prompt)


async def _collect(stream: Any) -> str:
    return "".join([part async for part in stream])


CASES = [
    Case("function", _function, lambda f, prompt: f(prompt), {}),
    Case("coroutine", _coroutine, lambda f, prompt: asyncio.run(f(prompt)), {}),
    Case("generator", _generator, lambda f, prompt: "".join(f(prompt)), {}),
    Case("async-generator", _async_generator, lambda f, prompt: asyncio.run(_collect(f(prompt))), {}),
    Case("diffusers", _painter, _paint, {}),
    Case("causal-lm", _model, _generate, {"tokenizer": TOKENIZER}),
    Case("text-pipeline", _text_pipeline, _run_pipeline, {}),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


def guarded(case: Case, inputs: Any = None, outputs: Any = None, **policy: Any) -> tuple[Any, list[str]]:
    target, seen = case.make()
    guard = Guard(
        inputs=[WordCheck("knife")] if inputs is None else inputs,
        outputs=[WordCheck("blood"), BrightCheck()] if outputs is None else outputs,
        policy=Policy(**policy),
    )
    return guard(target, **case.how), seen


def test_harmless_call_passes_and_is_reported(case: Case) -> None:
    target, seen = guarded(case)
    with capture() as reports:
        case.call(target, SAFE)
    assert [r.action for r in reports] == [Action.ALLOW]
    assert len(seen) == 1


def test_unsafe_prompt_is_blocked_and_reaches_nothing(case: Case) -> None:
    target, seen = guarded(case)
    with pytest.raises(Blocked, match=r"blocked by words: bad 1\.00"):
        case.call(target, UNSAFE)
    assert seen == []


def test_unsafe_result_is_blocked(case: Case) -> None:
    target, seen = guarded(case)
    with pytest.raises(Blocked):
        case.call(target, UNSAFE_RESULT)
    assert len(seen) == 1


def test_withheld_result_is_replaced_where_the_policy_says_so(case: Case) -> None:
    target, _ = guarded(case, on_block="replace")
    with capture() as reports:
        result = case.call(target, UNSAFE_RESULT)
    assert [r.action for r in reports] == [Action.BLOCK]
    if isinstance(result, str):
        assert (
            result.removeprefix(UNSAFE_RESULT) == ""
        )  # nothing but the prompt, where the target gives it back
    else:
        assert result.images[0].getextrema() == ((0, 0), (0, 0), (0, 0))


def test_failing_input_check_is_closed(case: Case) -> None:
    target, seen = guarded(case, inputs=[FailingCheck()])
    with pytest.raises(CheckFailed, match="'failing' failed with RuntimeError"):
        case.call(target, SAFE)
    assert seen == []


def test_failing_output_check_is_closed(case: Case) -> None:
    failing = [FailingCheck(), FailingCheck(modality="image")]
    target, _ = guarded(case, outputs=failing)
    with pytest.raises(CheckFailed, match="'failing' failed with RuntimeError"):
        case.call(target, SAFE)


def test_nan_score_is_closed(case: Case) -> None:
    target, seen = guarded(case, inputs=[ScoreCheck({}, {"bad": math.nan})])
    with pytest.raises(CheckFailed, match="gave NaN"):
        case.call(target, SAFE)
    assert seen == []


def test_input_that_cannot_be_read_is_refused(case: Case) -> None:
    import torch

    target, seen = guarded(case)
    prompt: Any = torch.zeros(1, 2, 16)  # no text; as embeddings where the target takes those
    if case.name == "text-pipeline":
        pytest.skip("the pipeline itself refuses what is no text or chat")
    with pytest.raises(UnseenInput):
        case.call(target, prompt)
    assert seen == []


def test_guarding_twice_is_refused(case: Case) -> None:
    target, _ = guarded(case)
    with pytest.raises(TypeError, match="guarded already"):
        Guard()(target, **case.how)


def test_target_is_usable_after_a_block(case: Case) -> None:
    target, seen = guarded(case)
    with pytest.raises(Blocked):
        case.call(target, UNSAFE)
    case.call(target, SAFE)
    assert len(seen) == 1
