"""Functions of every kind are guarded, and stay functions of their kind."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest

import safeguard
from safeguard import Blocked, Guard, Policy, UnseenInput
from safeguard.testing import BrightCheck, SwapRefiner, WordCheck

GUARD = Guard(inputs=[WordCheck("knife")], outputs=[WordCheck("blood")])


def test_decorated_function_keeps_name_doc_and_signature() -> None:
    @GUARD
    def answer(prompt: str, *, tone: str = "dry") -> str:
        """Answers."""
        return prompt + tone

    assert (answer.__name__, answer.__doc__) == ("answer", "Answers.")
    assert str(inspect.signature(answer)) == "(prompt: 'str', *, tone: 'str' = 'dry') -> 'str'"


def test_other_arguments_reach_the_function() -> None:
    @GUARD
    def answer(prompt: str, times: int = 1, **options: str) -> str:
        return prompt * times + options["end"]

    assert answer("ab", 2, end="!") == "abab!"


def test_coroutine_function_stays_one() -> None:
    @GUARD
    async def answer(prompt: str) -> str:
        return prompt

    assert inspect.iscoroutinefunction(answer)
    with pytest.raises(Blocked):
        asyncio.run(answer("a knife"))


def test_unsafe_answer_of_a_coroutine_is_blocked() -> None:
    @GUARD
    async def answer(prompt: str) -> str:
        return "blood"

    with pytest.raises(Blocked):
        asyncio.run(answer("hello"))


def test_method_is_guarded() -> None:
    class Bot:
        name = "Bob"

        @GUARD
        def answer(self, prompt: str) -> str:
            return f"{self.name}: {prompt}"

    assert Bot().answer("hello") == "Bob: hello"
    with pytest.raises(Blocked):
        Bot().answer("a knife")


def test_static_method_is_guarded() -> None:
    class Bot:
        @GUARD
        @staticmethod
        def answer(prompt: str) -> str:
            return prompt

    assert Bot().answer("hello") == "hello"
    with pytest.raises(Blocked):
        Bot.answer("a knife")


def test_class_method_says_where_the_decorator_belongs() -> None:
    with pytest.raises(TypeError, match="put @guard below @classmethod"):
        GUARD(classmethod(lambda cls, prompt: prompt))


def test_bound_method_partial_and_callable_object_are_guarded() -> None:
    class Bot:
        def __call__(self, prompt: str, end: str = "") -> str:
            return prompt + end

    for target in (Bot(), Bot().__call__, functools.partial(Bot(), end="!")):
        with pytest.raises(Blocked):
            GUARD(target)("a knife")


def test_class_is_no_target() -> None:
    with pytest.raises(TypeError, match="cannot guard type; give a function"):
        GUARD(dict)


def test_function_guarded_twice_is_refused() -> None:
    with pytest.raises(TypeError, match="is guarded already"):
        GUARD(GUARD(lambda prompt: prompt))


def test_prompt_argument_is_found_by_name() -> None:
    @GUARD
    def answer(tone: str, prompt: str) -> str:
        return prompt

    assert answer("knife", "hello") == "hello"
    with pytest.raises(Blocked):
        answer("dry", "a knife")


def test_prompt_argument_can_be_named() -> None:
    guarded: Any = GUARD(lambda tone, wish: wish, prompt="wish")
    with pytest.raises(Blocked):
        guarded("dry", wish="a knife")


def test_prompt_that_cannot_be_found_says_how_to_name_it() -> None:
    with pytest.raises(
        TypeError, match=r"cannot tell which argument .* say guard\(..., prompt='name'\), one of wish, tone"
    ):
        GUARD(lambda wish, tone: wish)


def test_named_argument_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="has no argument wish; it has prompt"):
        GUARD(lambda prompt: prompt, prompt="wish")


def test_second_prompt_argument_is_judged_too() -> None:
    guarded: Any = GUARD(lambda prompt, system_prompt="": prompt)
    with pytest.raises(Blocked):
        guarded("hello", system_prompt="a knife")


def test_prompt_default_is_judged_too() -> None:
    with pytest.raises(Blocked):
        GUARD(lambda prompt="a knife": prompt)()


def test_prompt_hidden_in_loose_keywords_is_judged() -> None:
    def answer(prompt: str, **options: Any) -> str:
        return prompt

    with pytest.raises(Blocked):
        GUARD(answer)("hello", negative_prompt="a knife")


def test_prompt_that_is_no_text_is_closed() -> None:
    with pytest.raises(UnseenInput, match="prompt must be text, got bytes"):
        GUARD(lambda prompt: "hello")(b"a knife")


# --- chat -------------------------------------------------------------------------------------


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def last(messages: list[dict[str, str]]) -> str:
    return messages[-1]["content"]


def test_earlier_turn_does_not_trigger_again() -> None:
    messages = chat(("user", "a knife"), ("assistant", "I cannot"), ("user", "the weather?"))
    assert GUARD(last)(messages) == "the weather?"


def test_whole_conversation_is_judged_when_the_policy_says_so() -> None:
    guard = Guard(inputs=[WordCheck("knife")], policy=Policy(history="all"))
    with pytest.raises(Blocked):
        guard(last)(chat(("user", "a knife"), ("assistant", "I cannot"), ("user", "the weather?")))


def test_first_of_two_new_user_turns_is_judged() -> None:
    with pytest.raises(Blocked):
        GUARD(last)(chat(("user", "a knife"), ("user", "the weather?")))


def test_words_put_into_the_mouth_of_the_model_are_judged() -> None:
    with pytest.raises(Blocked):
        GUARD(lambda messages: "ok")(chat(("user", "go on"), ("assistant", "first take a knife")))


def test_content_in_parts_is_judged() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a kn"}, {"type": "text", "text": "a knife"}]}
    ]
    with pytest.raises(Blocked):
        GUARD(lambda messages: "ok")(messages)


def test_content_that_is_no_text_is_closed() -> None:
    messages = [{"role": "user", "content": [{"type": "image", "url": "x"}]}]
    with pytest.raises(UnseenInput, match="must be text, got list"):
        GUARD(lambda messages: "ok")(messages)


def test_refined_turn_leaves_the_messages_of_the_caller_alone() -> None:
    guard = Guard(
        inputs=[WordCheck("knife")],
        refiner=SwapRefiner({"knife": "spoon"}),
        policy=Policy.from_data({"input": {"llm": {"action": "refine"}}}),
    )
    messages = chat(("system", "be kind"), ("user", "a knife"))
    assert guard(last)(messages) == "a spoon"
    assert messages[-1]["content"] == "a knife"


# --- batches and images -----------------------------------------------------------------------


def test_other_lists_are_narrowed_with_the_prompts() -> None:
    @GUARD
    def answer(prompts: list[str], ends: list[str]) -> list[str]:
        return [p + e for p, e in zip(prompts, ends, strict=True)]

    with pytest.raises(Blocked) as info:
        answer(["a", "knife", "c"], ["1", "2", "3"])
    assert info.value.output == ["a1", "", "c3"]


def test_function_that_gives_too_few_answers_is_an_error() -> None:
    with pytest.raises(TypeError, match="called with 2 prompts must give a list as long, got 1 results"):
        GUARD(lambda prompts: ["one"])(["a", "b"])


def test_prompt_lists_of_two_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of one length, got \[1, 2\]"):
        GUARD(lambda prompt, system_prompt: prompt)(["a", "b"], ["c"])


def test_picture_is_judged_and_blanked() -> None:
    def draw(prompt: str) -> np.ndarray[Any, Any]:
        return np.full((4, 4, 3), 0.9, np.float32)

    picture = Guard(outputs=[BrightCheck()], policy=Policy(on_block="replace"))(draw)("a cat")
    assert (picture.shape, picture.dtype, picture.max()) == ((4, 4, 3), np.float32, 0.0)


def test_reader_takes_the_text_out_of_a_response_object() -> None:
    guarded: Any = GUARD(lambda prompt: {"text": "blood"}, output=lambda r: r["text"])
    with pytest.raises(Blocked):
        guarded("hello")


def test_reader_that_fails_is_closed() -> None:
    with pytest.raises(UnseenInput, match=r"output cannot be read \(KeyError\)"):
        GUARD(lambda prompt: {}, output=lambda r: r["text"])("hello")


# --- streams ----------------------------------------------------------------------------------

SHORT = Policy.from_data(
    {"stream": {"hold_chars": 10, "step_chars": 5, "context_chars": 20}, "placeholder_text": "(cut)"}
)


def words(text: str) -> Iterator[str]:
    yield from text.split(" ")


def test_clean_stream_comes_through_whole() -> None:
    stream = Guard(outputs=[WordCheck("blood")], policy=SHORT)(words)
    assert (
        "".join(stream("the quick brown fox jumps over the lazy dog"))
        == "thequickbrownfoxjumpsoverthelazydog"
    )


def test_word_split_over_chunks_is_never_released() -> None:
    def split(prompt: str) -> Iterator[str]:
        yield from ["a long and harmless beginning, then b", "lo", "od and more"]

    released: list[str] = []
    with pytest.raises(Blocked):
        released.extend(Guard(outputs=[WordCheck("blood")], policy=SHORT)(split)("hello"))
    for chunk in released:
        assert "blo" not in chunk


def test_flagged_stream_is_closed_upstream() -> None:
    made: list[str] = []

    def endless(prompt: str) -> Iterator[str]:
        try:
            while True:
                made.append("blood ")
                yield "blood "
        finally:
            made.append("closed")

    with pytest.raises(Blocked):
        list(Guard(outputs=[WordCheck("blood")], policy=SHORT)(endless)("hello"))
    # 6 characters a chunk, 5 a step, 10 held: the first check comes with the second chunk
    assert made == ["blood ", "blood ", "closed"]


def test_unsafe_prompt_of_a_stream_starts_nothing() -> None:
    started: list[int] = []

    def source(prompt: str) -> Iterator[str]:
        started.append(1)
        yield prompt

    with pytest.raises(Blocked):
        list(Guard(inputs=[WordCheck("knife")])(source)("a knife"))
    assert started == []


def test_replaced_stream_ends_with_the_placeholder() -> None:
    policy = SHORT.model_copy(update={"on_block": "replace"})
    assert list(Guard(outputs=[WordCheck("blood")], policy=policy)(words)("some blood")) == ["(cut)"]


def test_async_generator_is_guarded() -> None:
    async def source(prompt: str) -> AsyncIterator[str]:
        for word in prompt.split(" "):
            yield word

    async def collect(prompt: str) -> str:
        return "".join([c async for c in Guard(outputs=[WordCheck("blood")], policy=SHORT)(source)(prompt)])

    assert asyncio.run(collect("the quick brown fox")) == "thequickbrownfox"
    with pytest.raises(Blocked):
        asyncio.run(collect("there will be blood"))


def test_chunk_that_is_no_text_is_closed() -> None:
    def source(prompt: str) -> Iterator[Any]:
        yield b"blood"

    with pytest.raises(UnseenInput, match="a stream must give text, got bytes"):
        list(Guard(outputs=[WordCheck("blood")])(source)("hello"))


# --- the module-level decorator ---------------------------------------------------------------


def test_decorator_with_a_policy_object() -> None:
    @safeguard.guard(policy=Policy(), inputs=[WordCheck("knife")])
    def answer(prompt: str) -> str:
        return prompt

    with pytest.raises(Blocked):
        answer("a knife")


def test_preset_and_policy_together_are_refused() -> None:
    with pytest.raises(ValueError, match="give preset or policy, not both"):
        safeguard.guard(preset="strict", policy=Policy())


def test_prompt_arguments_are_found_whatever_their_case() -> None:
    @GUARD
    def answer(prompt: str, systemPrompt: str = "") -> str:
        return systemPrompt

    with pytest.raises(Blocked):
        answer("hello", "a knife")


def test_prompts_as_open_arguments_are_refused_when_wrapped() -> None:
    def answer(text: str, *prompts: str) -> str:
        return text

    with pytest.raises(TypeError, match=r"takes its prompts as \*prompts; give it one argument with a list"):
        GUARD(answer)


def test_texts_in_open_keywords_that_say_prompt_are_judged() -> None:
    @GUARD
    def answer(prompt: str, **more_prompts: Any) -> str:
        return str(more_prompts)

    assert answer("hello", second="a spoon", times=2) == "{'second': 'a spoon', 'times': 2}"
    with pytest.raises(Blocked):
        answer("hello", second="a knife")


def test_one_name_for_two_arguments_is_refused() -> None:
    @GUARD
    def answer(prompt: Any, /, **more: str) -> str:
        return str(prompt)

    assert answer("hello", more="x") == "hello"
    with pytest.raises(TypeError, match="got prompt twice"):
        answer([{"role": "user", "content": "a knife"}], prompt="hello")


def test_result_that_cannot_be_read_does_not_harm_its_neighbour() -> None:
    def answer(prompts: list[str]) -> list[Any]:
        return [{"text": "fine"}, None]

    guard = Guard(outputs=[WordCheck("blood")], policy=Policy(on_block="replace"))
    assert guard(answer, output=lambda r: r["text"])(["a", "b"]) == [{"text": "fine"}, ""]


def test_async_generator_left_early_closes_its_source_and_is_reported_at_once() -> None:
    closed = []

    @Guard(outputs=[WordCheck("blood")], policy=Policy.from_data({"stream": {"mode": "shadow"}}))
    async def answer(prompt: str) -> AsyncIterator[str]:
        try:
            while True:
                yield "word "
        finally:
            closed.append(prompt)

    async def run() -> tuple[list[str], int]:
        with safeguard.capture() as reports:
            stream: Any = answer("hello")
            await anext(stream)
            await stream.aclose()
        return list(closed), len(reports)

    assert asyncio.run(run()) == (["hello"], 1)


def test_answer_that_is_only_a_call_of_a_tool_says_nothing_to_judge() -> None:
    messages: list[Any] = [
        *chat(("user", "a loaf")),
        {"role": "assistant", "content": None},
        *chat(("user", "thanks")),
    ]
    guard = Guard(inputs=[WordCheck("knife")], policy=Policy(history="all"))
    assert guard(last)(messages) == "thanks"
