from __future__ import annotations

import random

import pytest

from safeguard.evaluate.near_duplicates import jaccard, nearest, word_set


def test_words_are_compared_as_a_set_without_case() -> None:
    assert word_set("A cat, a Cat!") == {"a", "cat"}


def test_jaccard_is_shared_words_by_all_words() -> None:
    # {a, red, cat} and {a, blue, cat}: two of four
    assert jaccard(word_set("a red cat"), word_set("a blue cat")) == 0.5


def test_a_near_duplicate_has_its_similarity_and_others_nothing() -> None:
    # {a, b, c, d, e} and {a, b, c, d}: 4/5
    assert nearest(["a b c d e", "x y z"], ["a b c d"], threshold=0.8) == [0.8, 0.0]


def test_below_the_threshold_it_is_none() -> None:
    assert nearest(["a b c d e"], ["a b c d"], threshold=0.81) == [0.0]


def test_no_training_text_has_no_duplicate() -> None:
    assert nearest(["a"], []) == [0.0]


def test_nothing_to_test_gives_nothing() -> None:
    assert nearest([], ["a"]) == []


def test_a_text_without_a_word_is_near_another_such() -> None:
    assert nearest(["!!!", "a"], ["..."]) == [1.0, 0.0]


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_the_index_finds_what_comparing_all_pairs_finds(threshold: float) -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices("abcdefghij", k=rng.randint(1, 8))) for _ in range(120)]
    tests, training = texts[:40], texts[40:]
    best = [max(jaccard(word_set(a), word_set(b)) for b in training) for a in tests]
    assert nearest(tests, training, threshold=threshold) == [v if v >= threshold else 0.0 for v in best]


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_a_threshold_out_of_range_is_an_error(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold must be in \(0, 1\]"):
        nearest(["a"], ["a"], threshold=threshold)
