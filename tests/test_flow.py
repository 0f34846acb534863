"""The guarded call: what is judged when, what is refined, what is made again, and that doubt is closed."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from safeguard import (
    Action,
    Blocked,
    CheckFailed,
    CheckTimeout,
    Guard,
    RefineRequest,
    UnseenInput,
    capture,
)
from safeguard.testing import FailingCheck, HangingCheck, ScoreCheck, SwapRefiner, WordCheck
from tests.policies import echo, llm, policy, text


class Script:
    """A generating function that gives the next of its answers, and remembers the prompts it was given."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.prompts = list(answers), []  # type: ignore[var-annotated]

    def __call__(self, prompt: str) -> str:
        self.prompts.append(prompt)
        return self.answers[len(self.prompts) - 1]


# --- before generation ------------------------------------------------------------------------


def test_clean_prompt_reaches_the_function_byte_for_byte() -> None:
    assert Guard(inputs=[WordCheck("knife")])(echo)("a  loaf\n") == "a  loaf\n"


def test_unsafe_prompt_never_reaches_the_function() -> None:
    script = Script("answer")
    with pytest.raises(Blocked):
        Guard(inputs=[WordCheck("knife")])(script)("a knife")
    assert script.prompts == []


def test_blocked_error_names_check_category_and_score_and_no_content() -> None:
    with pytest.raises(Blocked, match=r"^blocked by words: bad 1\.00$"):
        Guard(inputs=[WordCheck("knife")])(echo)("a knife")


def test_refined_prompt_is_what_the_function_gets() -> None:
    guard = Guard(inputs=[WordCheck("knife")], refiner=SwapRefiner({"knife": "spoon"}), policy=llm("refine"))
    assert guard(echo)("a knife") == "a spoon"


def test_refined_prompt_is_checked_again_before_use() -> None:
    check = WordCheck("knife", "dagger")
    guard = Guard(inputs=[check], refiner=SwapRefiner({"knife": "dagger"}), policy=llm("refine"))
    with pytest.raises(Blocked):
        guard(echo)("a knife")
    assert check.seen == ["a knife", "a dagger"]


def test_without_a_refiner_what_should_be_refined_is_blocked() -> None:
    with pytest.raises(Blocked):
        Guard(inputs=[WordCheck("knife")], policy=llm("refine"))(echo)("a knife")


def test_refiner_is_told_what_was_flagged_and_where() -> None:
    refiner = SwapRefiner({"knife": "spoon"})
    Guard(inputs=[WordCheck("knife")], refiner=refiner, policy=llm("refine"))(echo)("a knife")
    (request,) = refiner.requests
    assert (request.flagged, [(s.start, s.end) for s in request.spans]) == (("bad",), [(2, 7)])


@pytest.mark.parametrize("answer", [[], ["a", "b"], [None], [""], ["  "], "a spoon", None])
def test_refiner_that_gives_nothing_usable_blocks(answer: Any) -> None:
    class Odd:
        name = "odd"

        def __call__(self, requests: Sequence[RefineRequest], /) -> Any:
            return answer

    with pytest.raises(Blocked):
        Guard(inputs=[WordCheck("knife")], refiner=Odd(), policy=llm("refine"))(echo)("a knife")


def test_refiner_that_raises_blocks() -> None:
    class Broken:
        name = "broken"

        def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
            raise RuntimeError("out of memory")

    with pytest.raises(Blocked):
        Guard(inputs=[WordCheck("knife")], refiner=Broken(), policy=llm("refine"))(echo)("a knife")


def test_redacted_prompt_loses_the_flagged_words_only() -> None:
    guard = Guard(inputs=[WordCheck("knife")], policy=llm("redact", placeholder_text="[...]"))
    assert guard(echo)("a knife here") == "a [...] here"


def test_monitor_action_lets_pass_and_says_so() -> None:
    with capture() as reports:
        assert Guard(inputs=[WordCheck("knife")], policy=llm("monitor"))(echo)("a knife") == "a knife"
    assert (reports[0].action, reports[0].flagged) == (Action.MONITOR, ("bad",))


def test_monitor_mode_changes_nothing_even_when_a_check_fails() -> None:
    guard = Guard(inputs=[FailingCheck()], outputs=[WordCheck("knife")], policy=policy(mode="monitor"))
    assert guard(echo)("a knife") == "a knife"


def test_strongest_action_of_several_categories_wins() -> None:
    check = ScoreCheck({"x": {"mild": 0.9, "grave": 0.9}})
    rules = {"action": "refine", "categories": {"grave": {"action": "block"}}}
    guard = Guard(inputs=[check], refiner=SwapRefiner({"x": "y"}), policy=policy(input={"llm": rules}))
    with pytest.raises(Blocked):
        guard(echo)("x")


# --- after generation -------------------------------------------------------------------------


def test_unsafe_answer_is_blocked() -> None:
    with pytest.raises(Blocked):
        Guard(outputs=[WordCheck("knife")])(echo)("a knife")


def test_replaced_answer_does_not_raise() -> None:
    guard = Guard(outputs=[WordCheck("knife")], policy=text("replace", placeholder_text="(withheld)"))
    assert guard(echo)("a knife") == "(withheld)"


def test_on_block_replace_gives_the_placeholder() -> None:
    guard = Guard(
        outputs=[WordCheck("knife")], policy=policy(on_block="replace", placeholder_text="(withheld)")
    )
    assert guard(echo)("a knife") == "(withheld)"


def test_redacted_answer_loses_the_flagged_words_only() -> None:
    guard = Guard(outputs=[WordCheck("knife")], policy=text("redact"))
    assert guard(echo)("a knife here") == "a [redacted] here"


def test_answer_flagged_as_a_whole_cannot_be_redacted_and_is_blocked() -> None:
    check = ScoreCheck({"vile": {"bad": 0.9}})
    with pytest.raises(Blocked):
        Guard(outputs=[check], policy=text("redact"))(echo)("vile")


def test_regenerated_answer_is_judged_and_returned() -> None:
    script = Script("a knife", "a spoon")
    with capture() as reports:
        answer = Guard(outputs=[WordCheck("knife")], policy=text("regenerate"))(script)("cutlery")
    assert (answer, reports[0].action, reports[0].rounds) == ("a spoon", Action.REGENERATE, 1)


def test_last_round_is_judged_too() -> None:
    # max_rounds 2: one first answer and two more, all unsafe; the published loop would return the third
    script = Script("knife 1", "knife 2", "knife 3", "a spoon")
    with pytest.raises(Blocked):
        Guard(outputs=[WordCheck("knife")], policy=text("regenerate", max_rounds=2))(script)("cutlery")
    assert len(script.prompts) == 3


def test_iterative_refinement_gives_the_refiner_the_original_prompt_and_the_latest_answer() -> None:
    refiner = SwapRefiner({"cutlery": "plates"})
    script = Script("knife 1", "knife 2", "a plate")
    guard = Guard(outputs=[WordCheck("knife")], refiner=refiner, policy=text("refine"))
    assert guard(script)("cutlery") == "a plate"
    assert [(r.prompt, r.result, r.round) for r in refiner.requests] == [
        ("cutlery", "knife 1", 1),
        ("cutlery", "knife 2", 2),
    ]
    assert script.prompts == ["cutlery", "plates", "plates"]


def test_prompt_refined_after_generation_is_checked_before_use() -> None:
    script = Script("knife", "never made")
    guard = Guard(
        inputs=[WordCheck("dagger")],
        outputs=[WordCheck("knife")],
        refiner=SwapRefiner({"cutlery": "dagger"}),
        policy=text("refine"),
    )
    with pytest.raises(Blocked):
        guard(script)("cutlery")
    assert script.prompts == ["cutlery"]


def test_redacted_answer_is_judged_again() -> None:
    # cutting the inner word joins the outer one together again
    guard = Guard(outputs=[WordCheck("knife")], policy=text("redact", placeholder_text="ni"))
    with pytest.raises(Blocked):
        guard(echo)("kknifefe")


def test_negative_prompt_is_never_softened_but_blocked() -> None:
    def draw(prompt: str, negative_prompt: str = "") -> str:
        return negative_prompt

    guard = Guard(inputs=[WordCheck("knife")], refiner=SwapRefiner({"knife": "spoon"}), policy=llm("refine"))
    with pytest.raises(Blocked):
        guard(draw)("a cat", negative_prompt="knife")


def test_negative_prompt_passes_and_is_reported_where_the_policy_says_so() -> None:
    def draw(prompt: str, negative_prompt: str = "") -> str:
        return negative_prompt

    guard = Guard(inputs=[WordCheck("knife")], policy=policy(negative_prompt="report"))
    with capture() as reports:
        assert guard(draw)("a cat", negative_prompt="knife") == "knife"
    assert (reports[0].action, reports[0].flagged) == (Action.MONITOR, ("bad",))


# --- batches ----------------------------------------------------------------------------------


def shout(prompts: list[str]) -> list[str]:
    return [p.upper() for p in prompts]


def test_blocked_item_of_a_batch_leaves_its_neighbours_whole() -> None:
    with pytest.raises(Blocked) as info:
        Guard(inputs=[WordCheck("knife")])(shout)(["a", "a knife", "b"])
    assert info.value.output == ["A", "", "B"]
    assert [r.action for r in info.value.reports] == [Action.ALLOW, Action.BLOCK, Action.ALLOW]


def test_refused_item_of_a_batch_is_not_generated() -> None:
    seen: list[list[str]] = []

    def spy(prompts: list[str]) -> list[str]:
        seen.append(prompts)
        return prompts

    Guard(inputs=[WordCheck("knife")], policy=policy(on_block="replace"))(spy)(["a", "a knife", "b"])
    assert seen == [["a", "b"]]


def test_check_that_fails_on_one_item_blocks_that_item_alone() -> None:
    check = FailingCheck(when=lambda item: item == "odd")
    with pytest.raises(CheckFailed) as info:
        Guard(inputs=[check])(shout)(["a", "odd", "b"])
    assert info.value.output == ["A", "", "B"]


def test_equal_texts_of_a_batch_are_scored_once() -> None:
    check = WordCheck("knife")
    Guard(inputs=[check])(shout)(["a", "a", "a"])
    assert check.seen == ["a"]


def test_batch_larger_than_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 2 prompts"):
        Guard(inputs=[WordCheck("knife")], policy=policy(max_items=2))(shout)(["a", "b", "c"])


# --- closed when in doubt ---------------------------------------------------------------------


class Odd:
    """A check whose results are whatever the test says."""

    name = "odd"
    modality = "text"

    def __init__(self, results: Callable[[Sequence[str]], Any]) -> None:
        self._results = results

    def __call__(self, batch: Sequence[str], /) -> Any:
        return self._results(batch)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, -0.1, 1.1])
def test_score_that_is_no_probability_is_an_error_and_closed(score: float) -> None:
    with pytest.raises(CheckFailed, match=r"scores must be in \[0, 1\]"):
        Guard(inputs=[ScoreCheck({}, {"bad": score})])(echo)("hello")


@pytest.mark.parametrize(
    "results",
    [
        lambda b: [],
        lambda b: [{}],
        lambda b: None,
        lambda b: [None],
        lambda b: [{"bad": "high"}],
        lambda b: [{"bad": None}],
    ],
    ids=["too few", "no scores", "None", "row None", "text score", "None score"],
)
def test_malformed_result_of_a_check_is_an_error_and_closed(results: Callable[[Sequence[str]], Any]) -> None:
    with pytest.raises(CheckFailed, match="check 'odd'"):
        Guard(inputs=[Odd(results)])(echo)("hello")


def test_failed_check_is_counted_apart_from_a_block() -> None:
    with capture() as reports, pytest.raises(CheckFailed, match="'failing' failed with RuntimeError"):
        Guard(inputs=[FailingCheck()])(echo)("hello")
    assert (reports[0].blocked, reports[0].failed, reports[0].flagged) == (True, True, ())


def test_real_block_beats_a_failure_in_the_same_batch() -> None:
    check = FailingCheck(when=lambda item: item == "odd")
    with pytest.raises(Blocked):
        Guard(inputs=[check, WordCheck("knife")])(shout)(["odd", "a knife"])


def test_on_error_allow_lets_pass_and_logs_each_time(caplog: pytest.LogCaptureFixture) -> None:
    guarded = Guard(inputs=[FailingCheck()], policy=policy(on_error="allow"))(echo)
    with caplog.at_level("WARNING", "safeguard"):
        assert guarded("hello") == "hello"
    assert "let through by policy" in caplog.text


def test_guard_is_usable_after_a_failure() -> None:
    guarded = Guard(inputs=[FailingCheck(when=lambda item: item == "odd")])(echo)
    with pytest.raises(CheckFailed):
        guarded("odd")
    assert guarded("hello") == "hello"


def test_hanging_check_times_out_and_blocks() -> None:
    check = HangingCheck()
    with pytest.raises(CheckTimeout, match="'hanging' timed out"):
        Guard(inputs=[check], policy=policy(check_timeout_s=0.05))(echo)("hello")
    check.release()


def test_hanging_check_times_out_on_an_event_loop_too() -> None:
    check = HangingCheck()

    async def reply(prompt: str) -> str:
        return prompt

    with pytest.raises(CheckTimeout):
        asyncio.run(Guard(inputs=[check], policy=policy(check_timeout_s=0.05))(reply)("hello"))
    check.release()


def test_total_time_is_shared_by_all_checks() -> None:
    class Slow:
        modality = "text"

        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, batch: Sequence[str], /) -> list[dict[str, float]]:
            time.sleep(0.15)
            return [{"bad": 0.0} for _ in batch]

    with pytest.raises(CheckTimeout, match="'second' timed out"):
        Guard(inputs=[Slow("first"), Slow("second")], policy=policy(total_timeout_s=0.2))(echo)("hello")


def test_oversize_prompt_is_refused_unread() -> None:
    with pytest.raises(UnseenInput, match="prompt has 11 characters, more than max_chars 10"):
        Guard(inputs=[WordCheck("knife")], policy=policy(max_chars=10))(echo)("x" * 11)


def test_answer_of_another_type_is_closed() -> None:
    with pytest.raises(UnseenInput, match="output must be text, got int"):
        Guard(outputs=[WordCheck("knife")])(lambda prompt: 7)("hello")
