"""What is judged is what is handed on: copies, texts of odd classes, words beside the content of messages."""

from __future__ import annotations

from typing import Any

import pytest

from safeguard import Blocked, CheckFailed, Guard, Policy, UnseenInput
from safeguard.testing import SwapRefiner, WordCheck

GUARD = Guard(inputs=[WordCheck("knife")], outputs=[WordCheck("blood")])


def chat(*turns: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def last(messages: list[dict[str, str]]) -> str:
    return messages[-1]["content"]


class TwoFaced(str):
    """Holds one text and says another when it is written out, looked up or measured."""

    def __format__(self, spec: str) -> str:
        return "a knife and blood"

    def __str__(self) -> str:
        return "a knife and blood"

    def __len__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return hash("hello")

    def find(self, *args: Any) -> int:
        return -1


def test_prompt_of_another_class_is_handed_on_as_the_text_that_was_judged() -> None:
    assert GUARD(lambda prompt: f"{prompt}!")(TwoFaced("hello")) == "hello!"


def test_prompt_whose_class_hides_its_words_is_judged_by_them() -> None:
    with pytest.raises(Blocked):
        GUARD(lambda prompt: "ok")(TwoFaced("a knife"))


def test_prompt_that_calls_itself_equal_to_its_neighbour_is_judged_for_itself() -> None:
    reports = GUARD.check_input(["hello", TwoFaced("a knife")])
    assert [r.blocked for r in reports] == [False, True]


def test_prompt_that_calls_itself_short_is_too_long_all_the_same() -> None:
    guard = Guard(inputs=[WordCheck("knife")], policy=Policy(max_chars=5))
    with pytest.raises(UnseenInput, match="has 6 characters, more than max_chars 5"):
        guard(lambda prompt: "ok")(TwoFaced("sixsix"))


def test_answer_that_says_something_else_when_written_out_is_judged_by_both() -> None:
    with pytest.raises(Blocked):
        GUARD(lambda prompt: TwoFaced("fine"))("hello")


class Writing(WordCheck):
    """Changes what the caller still holds, as another thread may while a check runs."""

    def __init__(self, change: Any) -> None:
        super().__init__("knife")
        self._change = change

    def __call__(self, batch: Any, /) -> Any:
        self._change()
        return super().__call__(batch)


def test_messages_changed_while_they_are_judged_go_on_as_they_were_judged() -> None:
    messages = chat(("user", "hello"))

    def change() -> None:
        messages[0]["content"] = "a knife"
        messages.append({"role": "user", "content": "a knife"})

    guarded: Any = Guard(inputs=[Writing(change)])(lambda messages: str(messages))
    assert guarded(messages) == str(chat(("user", "hello")))


def test_prompts_changed_while_they_are_judged_go_on_as_they_were_judged() -> None:
    prompts = ["hello"]
    guard = Guard(inputs=[Writing(lambda: prompts.__setitem__(0, "a knife"))])
    assert guard(lambda prompts: list(prompts))(prompts) == ["hello"]


@pytest.mark.parametrize(
    "other",
    [
        {"name": "a knife"},
        {"parts": [{"text": "a knife"}]},
        {"tool_calls": [{"function": {"arguments": "a knife"}}]},
    ],
)
def test_words_beside_the_content_of_a_message_are_judged(other: dict[str, Any]) -> None:
    with pytest.raises(Blocked):
        GUARD(last)([{"role": "user", "content": "hello", **other}])


def test_call_of_a_tool_put_into_the_models_mouth_is_judged() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "a knife"}}]}
    with pytest.raises(Blocked):
        GUARD(lambda messages: "ok")([{"role": "user", "content": "hello"}, call])


def test_words_beside_the_content_cannot_be_refined_so_nothing_is_made() -> None:
    guard = Guard(
        inputs=[WordCheck("knife")],
        refiner=SwapRefiner({"knife": "spoon"}),
        policy=Policy.from_data({"input": {"llm": {"action": "refine"}}}),
    )
    with pytest.raises(CheckFailed, match=r"cannot put a new text in the place of messages\[0\]\.name"):
        guard(last)([{"role": "user", "content": "hello", "name": "a knife"}])


def test_system_turn_in_the_middle_of_a_chat_is_judged() -> None:
    with pytest.raises(Blocked):
        GUARD(last)(chat(("system", "be kind"), ("user", "hello"), ("system", "a knife"), ("user", "go")))


def test_system_turns_at_the_beginning_are_the_applications() -> None:
    messages = chat(("system", "no knife"), ("developer", "no knife either"), ("user", "hello"))
    assert GUARD(last)(messages) == "hello"


def test_prefill_in_two_parts_is_judged_whole() -> None:
    with pytest.raises(Blocked):
        GUARD(last)(chat(("user", "hello"), ("assistant", "a knife"), ("assistant", "is")))


def test_key_that_is_a_text_is_in_no_report_and_its_words_are_judged() -> None:
    message = {"role": "user", "content": "hello", "some blood": "fine", "more blood": "a knife"}
    with pytest.raises(Blocked) as info:
        GUARD(last)([message])
    assert "blood" not in info.value.report.to_json()
