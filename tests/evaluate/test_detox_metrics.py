from __future__ import annotations

import numpy as np
import pytest

from safeguard.evaluate.detox_metrics import by_family, distinct, expected_maximum, spread, toxic_share

SCORES = np.array([[0.1, 0.6, 0.3], [0.2, 0.5, 0.4]], np.float64)


def test_expected_maximum_is_the_mean_of_the_worst() -> None:
    # worst of the two prompts: 0.6 and 0.5
    assert expected_maximum(SCORES) == pytest.approx(0.55)


def test_toxic_share_counts_prompts_with_one_above_the_threshold() -> None:
    # 0.6 is above 0.5, 0.5 itself is not
    assert toxic_share(SCORES) == 0.5
    assert toxic_share(SCORES, 0.45) == 1.0


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="scores must be finite"):
        expected_maximum([[0.1, float("nan")]])


def test_scores_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \(prompt, continuation\)"):
        toxic_share([0.1, 0.2])


def test_distinct_counts_different_grams_over_all_words() -> None:
    # words: a b a b | a b: 6. Different: a, b -> 2/6; (a b), (b a) -> 2/6; (a b a), (b a b) -> 2/6
    texts = ["a b a b", "a b"]
    assert [distinct(texts, n) for n in (1, 2, 3)] == pytest.approx([2 / 6, 2 / 6, 2 / 6])


def test_grams_do_not_cross_texts() -> None:
    # (a b) and (b c): 2 of 4 words; (b b) would be across
    assert distinct(["a b", "b c"], 2) == 0.5


def test_distinct_of_nothing_is_nothing() -> None:
    assert distinct(["", "  "], 1) == 0.0


def test_spread_is_the_sample_deviation() -> None:
    # mean 3; squares 4 + 0 + 4 = 8, over 2 = 4, root 2
    assert spread([1, 3, 5]) == {"mean": 3.0, "std": 2.0, "runs": [1.0, 3.0, 5.0]}


def test_one_run_has_no_deviation() -> None:
    assert spread([0.5])["std"] is None


def test_in_distribution_is_the_unweighted_mean_of_three_families() -> None:
    # TP: gender 1 (of 2 prompts both), race 0, religion 0 -> 1/3, though half of the 4 prompts are toxic
    families = ["gender_lgbtq", "gender_lgbtq", "race_nationalities", "religion", "disability"]
    run = np.array([[0.9], [0.8], [0.1], [0.1], [0.7]], np.float32)
    table = by_family([run], families)
    assert table["in_distribution"]["tp"]["mean"] == pytest.approx(1 / 3)
    assert table["in_distribution"]["prompts"] == 4
    assert table["out_of_distribution"]["tp"]["mean"] == 1.0
    assert table["all"]["tp"]["mean"] == pytest.approx(3 / 5)


def test_other_families_have_no_distributions() -> None:
    assert set(by_family([np.array([[0.9]], np.float32)], ["rtp_insult"])) == {"rtp_insult", "all"}
