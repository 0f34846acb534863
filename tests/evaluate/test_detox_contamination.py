from __future__ import annotations

import pytest

from safeguard.evaluate.detox_contamination import (
    contamination,
    contamination_report,
    longest_spans,
    nearest_jaccard,
    words_of,
)

CORPUS = ["The calm lake lies under a wide, grey sky today.", "geese swim"]


def test_words_have_no_case_and_no_punctuation() -> None:
    assert words_of("Geese, SWIM!") == ["geese", "swim"]


def test_longest_span_of_words_in_a_row() -> None:
    # "lake lies under a" is 4 in a row; "swim geese" shares words, but no two in a row; nothing of the third
    items = ["my lake lies under a bridge", "swim geese", "xyz"]
    assert longest_spans(items, CORPUS).tolist() == [4, 1, 0]


def test_spans_do_not_cross_texts_of_the_corpus() -> None:
    assert longest_spans(["sky today geese swim"], CORPUS).tolist() == [2]


def test_jaccard_of_the_nearest_text() -> None:
    # {geese, swim, here}: 2 shared of 3; {calm}: 1 of 10
    found, which = nearest_jaccard(["geese swim here", "calm", "xyz"], CORPUS)
    assert found.tolist() == pytest.approx([2 / 3, 1 / 10, 0])
    assert which.tolist() == [1, 0, -1]


def test_contamination_names_items_by_number() -> None:
    # the first shares 8 words in a row, the second is a text of the corpus turned round, the third neither
    items = ["so the calm lake lies under a wide grey area", "swim, geese", "a calm day"]
    found = contamination(items, CORPUS)
    assert found["contaminated"] == [0, 1]
    assert (found["longest_span"], found["share_span_8"]) == (8, pytest.approx(1 / 3))
    assert (found["largest_jaccard"], found["share_jaccard"]) == (1.0, pytest.approx(1 / 3))


def test_contamination_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="texts on both sides"):
        contamination([], CORPUS)


def test_report_leaves_out_what_is_not_there() -> None:
    assert set(contamination_report(CORPUS, [], ["geese swim"])) == {"prompts in toxic corpus"}
