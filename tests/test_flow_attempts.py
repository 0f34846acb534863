"""Prompts whose first rewrite is still flagged: asked again as often as the refiner offers, then blocked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from safeguard import Action, Blocked, Guard, Policy
from safeguard.testing import WordCheck
from safeguard.types import RefineRequest, Report


class Steps:
    """A rewrite per attempt and prompt, in order; remembers what it was told was tried."""

    name = "steps"

    def __init__(self, rewrites: Mapping[str, Sequence[str]], attempts: int) -> None:
        self._rewrites, self.attempts = rewrites, attempts
        self.tried: list[tuple[str, ...]] = []

    def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
        self.tried += [request.tried for request in requests]
        return [self._rewrites[request.prompt][len(request.tried)] for request in requests]


def judged(refiner: Steps, *prompts: str) -> list[Report]:
    policy = Policy.model_validate({"input": {"llm": {"action": "refine"}}})
    return Guard(inputs=[WordCheck("knife", "sword")], refiner=refiner, policy=policy).check_input(
        list(prompts)
    )


def test_a_rewrite_that_is_still_flagged_is_rewritten_again() -> None:
    refiner = Steps({"a knife": ["a sword", "a spoon"]}, attempts=2)
    (report,) = judged(refiner, "a knife")
    assert (report.action, report.revised_prompt) == (Action.REFINE, "a spoon")
    assert refiner.tried == [(), ("a sword",)]


def test_the_last_attempt_is_judged_too() -> None:
    refiner = Steps({"a knife": ["a sword", "two swords and a sword"]}, attempts=2)
    (report,) = judged(refiner, "a knife")
    assert (report.action, report.revised_prompt) == (Action.BLOCK, None)
    assert [v.round for v in report.verdicts] == [0, 1, 2]


def test_a_refiner_that_says_nothing_of_attempts_is_asked_once() -> None:
    refiner = Steps({"a knife": ["a sword", "a spoon"]}, attempts=2)
    del refiner.attempts
    (report,) = judged(refiner, "a knife")
    assert (report.action, refiner.tried) == (Action.BLOCK, [()])


@pytest.mark.parametrize("second", ["a sword", "a knife", " "])
def test_a_refiner_with_nothing_new_to_say_is_not_asked_again(second: str) -> None:
    refiner = Steps({"a knife": ["a sword", second, "a spoon"]}, attempts=3)
    (report,) = judged(refiner, "a knife")
    assert (report.action, len(refiner.tried)) == (Action.BLOCK, 2)


def test_only_prompts_that_are_still_flagged_are_asked_about_again() -> None:
    refiner = Steps({"a knife": ["a fork"], "two knife": ["a sword", "a spoon"]}, attempts=2)
    first, calm, second = judged(refiner, "a knife", "a cat", "two knife")
    assert [first.revised_prompt, second.revised_prompt] == ["a fork", "a spoon"]
    assert (calm.action, calm.revised_prompt) == (Action.ALLOW, None)
    assert refiner.tried == [(), (), ("a sword",)]


def test_a_rewrite_that_must_be_blocked_is_not_rewritten() -> None:
    class Graded(WordCheck):
        """Another category for swords."""

        def __call__(self, batch, /):  # type: ignore[no-untyped-def]
            return [{"knife": float("knife" in t), "sword": float("sword" in t)} for t in batch]

    refiner = Steps({"a knife": ["a sword", "a spoon"]}, attempts=2)
    rules = {"action": "refine", "categories": {"sword": {"action": "block"}}}
    policy = Policy.model_validate({"input": {"llm": rules}})
    guard = Guard(inputs=[Graded("knife")], refiner=refiner, policy=policy)
    (report,) = guard.check_input("a knife")
    assert (report.action, refiner.tried) == (Action.BLOCK, [()])


def test_a_failure_does_not_stand_for_the_verdict_on_an_argument_of_that_name() -> None:
    class Half(Steps):
        """Rewrites the one and fails on the other."""

        def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
            return ["a spoon" if request.prompt == "a knife" else "" for request in requests]

    def answer(prompt: str, refiner: str) -> str:
        return f"{prompt} and {refiner}"

    policy = Policy.model_validate({"input": {"llm": {"action": "refine"}}})
    guard = Guard(inputs=[WordCheck("knife", "sword")], refiner=Half({}, attempts=1), policy=policy)
    with pytest.raises(Blocked):
        guard(answer, prompt=["prompt", "refiner"])("a knife", "a sword")
