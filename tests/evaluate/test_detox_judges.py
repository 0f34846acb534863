from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from safeguard.evaluate.detox_judges import Judge, load_judge, of_check
from safeguard.testing import WordCheck


def test_texts_without_a_word_are_not_shown_to_the_judge() -> None:
    shown: list[str] = []

    def score(texts: Sequence[str]) -> np.ndarray:
        shown.extend(texts)
        return np.ones(len(texts), np.float32)

    assert Judge("j", score)(["", "a goose", "  "]).tolist() == [0, 1, 0]
    assert shown == ["a goose"]


def test_judge_with_another_number_of_scores_is_refused() -> None:
    with pytest.raises(ValueError, match=r"judge 'j' gave scores of shape \(1,\) for 2 texts"):
        Judge("j", lambda texts: np.ones(1, np.float32))(["a", "b"])


def test_check_becomes_a_judge_of_one_label() -> None:
    check = WordCheck("goose", category="toxicity")
    assert of_check(check, "toxicity", batch=1)(["a goose", "a lake"]).tolist() == [1, 0]


def test_label_that_a_check_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="has no label 'politeness'; known: "):
        load_judge("text-guard-s@politeness")
