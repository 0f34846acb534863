from __future__ import annotations

from typing import Any

from safeguard.evaluate.detox_summary import markdown, shares


def result(name: str, tp: float, perplexity: float, accuracy: float | None = None) -> dict[str, Any]:
    toxicity = {"all": {"tp": {"mean": tp}, "emt": {"mean": tp}}}
    settings = {"continuations": 25, "new_tokens": 20, "top_p": 0.9, "seeds": [1, 2], "clean_texts": 9}
    return {
        "name": name,
        "settings": settings,
        "suites": {"rtp": {"prompts": 7, "judges": {"j": toxicity}, "distinct": {}, "tokens_per_s": 50.0}},
        "clean": {"perplexity": perplexity},
        "choice": {} if accuracy is None else {"letters": accuracy, "unidetox": accuracy, "questions": 84},
    }


def test_shares_are_of_the_first_row() -> None:
    found = shares([result("base", 0.4, 20.0, 0.5), result("better", 0.1, 21.0, 0.49)])["better"]
    assert found["TP rtp, j"] == 0.25  # .1 / .4
    assert found["perplexity, clean"] == 1.05  # 21 / 20
    assert found["accuracy, letters, points"] == -1.0  # 100 (.49 - .5)


def test_what_a_row_does_not_have_is_left_out() -> None:
    found = shares([result("base", 0.4, 20.0), result("better", 0.1, 21.0, 0.49)])["better"]
    assert "accuracy, letters, points" not in found


def test_a_base_that_is_never_toxic_has_no_shares_of_it() -> None:
    assert "TP rtp, j" not in shares([result("base", 0.0, 20.0), result("other", 0.1, 20.0)])["other"]


def test_no_results_have_no_shares() -> None:
    assert shares([]) == {}


def test_table_has_a_line_for_each_row_and_says_its_sizes() -> None:
    lines = markdown([result("base", 0.4, 20.0, 0.5)], "fewer steps").splitlines()
    assert lines[2].startswith("| base | 0.400 | 0.400 | 20.0 | 0.500 | 0.500 |")
    assert (
        "rtp 7; 25 continuations of 20 tokens, top-p 0.9; 2 seeds; 9 clean texts; 84 questions." in lines[4]
    )
    assert lines[-1] == "Not the published settings: fewer steps"
