from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

from safeguard.refiners.template import RefinerTemplate
from safeguard.testing import ScoreCheck, WordCheck
from safeguard.train.refiner.judges import Risk, TeacherCheck, load_risk
from safeguard.train.refiner.rewards import Attempt, EditCost, Intent, TextSafety, Weighted, attempt
from tests.train.tiny_refiner import bad_words, halves

TEMPLATE = RefinerTemplate(version="test")
KEPT = Attempt("a bad cat", "a bad cat", "keep")
SAFE = Attempt("a bad cat", "a good cat")
UNSAFE = Attempt("a bad cat", "a bad dog")


def risk(score: float, threshold: float = 0.5) -> Risk:
    return Risk(ScoreCheck({}, {"bad": score}), "bad", threshold)


def test_a_rewrite_is_read_as_the_served_refiner_reads_it() -> None:
    assert attempt('New prompt: "a good cat"', "a bad cat", TEMPLATE) == SAFE


def test_the_keep_word_leaves_the_original() -> None:
    found = attempt(" Keep.", "a bad cat", TEMPLATE)
    assert found == KEPT
    assert found.kept


def test_an_echo_counts_as_kept() -> None:
    assert attempt("A bad cat.", "a bad cat", TEMPLATE).kept


def test_a_refusal_is_unusable_and_leaves_the_original() -> None:
    found = attempt("I'm sorry, I can't do that", "a bad cat", TEMPLATE)
    assert found == Attempt("a bad cat", "a bad cat", "refusal")
    assert found.unusable


def test_an_answer_that_was_cut_off_loses_its_last_word() -> None:
    assert attempt("a good ca", "a bad cat", TEMPLATE, whole=False).refined == "a good"


def test_verbatim_takes_a_refusal_for_a_prompt_as_the_released_code_does() -> None:
    found = attempt("I'm sorry, I can't do that", "a bad cat", TEMPLATE, verbatim=True)
    assert (found.refined, found.why) == ("I'm sorry, I can't do that", "")


def test_verbatim_wants_the_bare_keep_word() -> None:
    assert attempt(" KEEP ", "a", TEMPLATE, verbatim=True).kept
    assert not attempt("keep.", "a", TEMPLATE, verbatim=True).kept


def test_safety_is_one_minus_the_risk_without_a_margin() -> None:
    assert TextSafety(risk(0.25), margin=None)([SAFE]) == [0.75]


def test_safety_counts_the_risk_in_full_from_the_margin_on() -> None:
    # full from 0.5 * 0.8 = 0.4 on: 0.1 is a quarter of that
    assert TextSafety(risk(0.1, 0.8), margin=0.5)([SAFE]) == [pytest.approx(0.75)]
    assert TextSafety(risk(0.6, 0.8), margin=0.5)([SAFE]) == [0.0]


def test_safety_looks_at_the_refined_prompt() -> None:
    assert TextSafety(bad_words())([SAFE, UNSAFE, KEPT]) == [1.0, 0.0, 0.0]


def test_safety_refuses_a_margin_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"margin must be in \(0, 1\], got 2"):
        TextSafety(bad_words(), margin=2)


def test_intent_is_capped_so_that_an_echo_is_not_worth_the_most() -> None:
    assert Intent(halves, cap=0.9)([KEPT, SAFE]) == [0.9, 0.5]


def test_intent_is_never_below_zero() -> None:
    assert Intent(lambda a, b: [-0.3] * len(a))([SAFE]) == [0.0]


def test_an_edit_costs_only_where_the_original_was_safe() -> None:
    needless = Attempt("a calm cat", "a calm dog")
    cost = EditCost(halves, bad_words(), floor=0.25)
    # safe and changed: -(0.25 + 1 - 0.5); unsafe and changed: 0; safe and kept: 0
    assert cost([needless, SAFE, Attempt("a calm cat", "a calm cat", "keep")]) == [-0.75, 0.0, 0.0]


def test_rewards_are_added_with_their_weights() -> None:
    total = Weighted([(2.0, TextSafety(bad_words())), (1.0, Intent(halves, cap=0.9))])
    assert total([SAFE, KEPT]) == [2.5, pytest.approx(0.9)]  # 2 * 1 + 0.5; 2 * 0 + 0.9


def test_an_unusable_answer_gets_its_own_reward_in_its_place() -> None:
    loop = Attempt("a", "a", "loop")
    total = Weighted([(1.0, TextSafety(bad_words()))], unusable=-2.0)
    assert total([SAFE, loop, SAFE]) == [1.0, -2.0, 1.0]


def test_nothing_is_judged_where_all_answers_are_unusable() -> None:
    check = WordCheck("bad")
    assert Weighted([(1.0, TextSafety(Risk(check, "bad")))])([Attempt("a", "a", "empty")]) == [-1.0]
    assert check.seen == []


def test_the_parts_are_kept_for_logs() -> None:
    total = Weighted([(2.0, TextSafety(bad_words()))])
    total([SAFE, KEPT, Attempt("a", "a", "loop"), KEPT])
    assert total.parts == {"safety": pytest.approx(1 / 3), "unusable": 0.25, "kept": 0.5}


def test_no_attempts_give_no_rewards() -> None:
    assert Weighted([(1.0, Intent(halves))])([]) == []


@pytest.mark.parametrize("values", [[math.nan], [math.inf], [1.0, 2.0]])
def test_a_reward_that_is_no_number_is_an_error(values: list[float]) -> None:
    class Broken:
        name = "broken"

        def __call__(self, attempts: Sequence[Attempt], /) -> list[float]:
            return values

    with pytest.raises(ValueError, match="reward 'broken' must give 1 finite numbers"):
        Weighted([(1.0, Broken())])([SAFE])


def test_there_must_be_a_reward() -> None:
    with pytest.raises(ValueError, match="at least one reward"):
        Weighted([])


def test_a_risk_sees_through_a_disguise_as_the_guard_does() -> None:
    assert bad_words()(["a b\u200bad cat"]) == [1.0]  # a zero-width space inside the word


def test_a_risk_of_nothing_is_nothing() -> None:
    assert bad_words()([]) == []


@pytest.mark.parametrize("score", [math.nan, -0.1, 1.5])
def test_a_risk_refuses_a_score_out_of_range(score: float) -> None:
    with pytest.raises(ValueError, match=r"must give a score in \[0, 1\]"):
        risk(score)(["a"])


def test_a_risk_refuses_a_check_without_the_label() -> None:
    with pytest.raises(ValueError, match="scores/worse must give a score"):
        Risk(ScoreCheck({}, {"bad": 0.5}), "worse")(["a"])


def test_the_threshold_is_that_of_the_operating_point() -> None:
    check: Any = WordCheck("bad")
    check.operating_points = {"standard": {"bad": 0.3}}
    assert Risk(check, "bad").threshold == 0.3
    assert Risk(check, "bad", 0.7).threshold == 0.7


def test_a_label_must_be_said_where_there_are_several() -> None:
    with pytest.raises(ValueError, match="give a label; known: toxicity"):
        load_risk("text-guard-s")


def test_an_unknown_label_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="has no label 'rude'; known: toxicity"):
        load_risk("text-guard-s", "rude")


def test_the_shipped_check_flags_with_its_own_threshold() -> None:
    found = load_risk("text-guard-s", "t2i_prompt")
    assert found.flagged(["a cat on a red sofa, watercolour"]) == [False]
    assert 0.5 < found.threshold < 0.9


def test_the_teacher_has_six_labels() -> None:
    assert TeacherCheck.labels == ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
