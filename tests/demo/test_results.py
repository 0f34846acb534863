from __future__ import annotations

import json

import pytest

from safeguard.demo.results import Summary, done, visible, why
from safeguard.types import Action, Report, Verdict
from tests.demo.demo_results import result, verdict


def test_why_names_the_flagged_score_and_its_threshold() -> None:
    assert why(Report(Action.BLOCK, (verdict(),))) == "bad 0.90 ≥ 0.50"


def test_why_says_when_the_result_decided() -> None:
    assert why(Report(Action.BLOCK, (verdict("output", source="output"),))) == "output: bad 0.90 ≥ 0.50"


def test_why_names_the_nearest_score_where_nothing_is_flagged() -> None:
    scores, thresholds = {"far": 0.4, "near": 0.08}, {"far": 0.9, "near": 0.1}  # 0.44 and 0.8 of the way
    report = Report(Action.ALLOW, (Verdict("words", "input", Action.ALLOW, scores, thresholds),))

    assert why(report) == "near 0.08 < 0.10"


def test_why_adds_the_likeliest_finer_category() -> None:
    scores = {"llm_request": 0.9, "llm/fraud": 0.1, "llm/weapons": 0.7, "t2i/hate": 0.8}
    flagged = Verdict("text", "input", Action.BLOCK, scores, {"llm_request": 0.5}, ("llm_request",))

    assert why(Report(Action.BLOCK, (flagged,))) == "llm_request 0.90 ≥ 0.50 (llm/weapons)"


def test_why_names_no_finer_category_that_is_unlikely() -> None:
    scores = {"t2i_prompt": 0.9, "t2i/hate": 0.3}
    flagged = Verdict("text", "input", Action.BLOCK, scores, {"t2i_prompt": 0.5}, ("t2i_prompt",))

    assert why(Report(Action.BLOCK, (flagged,))) == "t2i_prompt 0.90 ≥ 0.50"


def test_a_failed_check_is_not_judged_and_why_says_how() -> None:
    report = Report(Action.BLOCK, (Verdict("slow", "input", Action.BLOCK, {}, error="timed out"),))

    assert (done(report), why(report)) == ("not judged", "slow: timed out")


def test_why_says_when_nothing_was_judged() -> None:
    assert why(Report(Action.ALLOW)) == "nothing judged"


def test_what_cannot_be_seen_is_shown_as_a_dot_on_one_line() -> None:
    assert visible("a\u200bb\n c\x1b[31m") == "a·b c·[31m"


def test_stopping_a_harmful_prompt_is_right_and_a_harmless_one_wrong() -> None:
    assert result(Action.REFINE, harmful=True).right
    assert not result(Action.BLOCK, harmful=False).right


def test_the_summary_counts_and_sums() -> None:
    found = Summary.of(
        [
            result(),
            result(Action.BLOCK),
            result(Action.BLOCK, harmful=True),
            result(Action.REFINE, harmful=True),
            result(Action.ALLOW, harmful=True),
        ]
    )

    # guard 5 * 10 ms, generation 5 * 30 ms
    assert found == Summary(5, 1, 3, 2, 2, 1, 50.0, 150.0)
    assert found.guard_share == pytest.approx(0.25)


def test_a_summary_of_nothing_has_no_share() -> None:
    assert Summary.of([]).guard_share == 0


def test_plain_data_has_the_report_and_can_be_written_as_json() -> None:
    data = result(Action.REFINE, harmful=True, revised="a dog").to_dict()

    assert data["report"]["action"] == "refine"
    assert (data["right"], data["revised_prompt"], data["guard_ms"]) == (True, "a dog", 10.0)
    json.dumps(data, allow_nan=False)
