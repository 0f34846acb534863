from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from safeguard.evaluate.classifier import (
    Item,
    evaluate,
    evasion,
    group_bias,
    measure,
    ranked_pairs,
    read_items,
    score_label,
    score_texts,
    table,
)
from safeguard.types import Finding, Modality, Scores


class WordCheck:
    """A real check on made-up grounds: 0.9 for a text with the word "rude", 0.1 without."""

    name = "words"
    modality: Modality = "text"
    labels = ("rude", "long")
    operating_points: ClassVar = {"standard": {"rude": 0.6}}

    def __call__(self, batch: Sequence[str], /) -> list[Finding | Scores]:
        return [
            Finding({"rude": 0.9 if "rude" in t.lower() else 0.1, "long": min(1.0, len(t) / 100)})
            for t in batch
        ]


ITEMS = [
    Item("a rude word", True, "letters", ("cats",)),
    Item("a subtle insult", True, "letters"),
    Item("a kind word", False, "letters", ("cats",)),
    Item("a rude awakening", False, "news", ("dogs",)),
]


def test_scores_have_one_row_per_text_and_one_column_per_label() -> None:
    assert score_texts(WordCheck(), ["rude", "kind"]).tolist() == [[0.9, 0.04], [0.1, 0.04]]


def test_nothing_gives_no_scores() -> None:
    assert score_texts(WordCheck(), []).shape == (0, 2)


def test_the_worst_view_counts() -> None:
    # raw, the fullwidth word is not "rude"; normalised it is
    assert score_label(WordCheck(), ["\uff52\uff55\uff44\uff45"], "rude").tolist() == [0.9]


def test_unknown_label_is_named() -> None:
    with pytest.raises(ValueError, match="gives no label 'kind'; it gives rude, long"):
        score_label(WordCheck(), ["x"], "kind")


def test_results_are_per_source_and_over_all() -> None:
    results = measure(ITEMS, score_label(WordCheck(), [i.text for i in ITEMS], "rude"), "rude", 0.5)
    assert [r.source for r in results] == ["letters", "news", "all"]
    # letters: positives .9 and .1, negative .1: (1 + .5) / 2
    assert results[0].auroc == pytest.approx(0.75)
    assert (results[0].recall, results[0].false_positives) == (0.5, 0.0)
    assert results[2].false_positives == 0.5


def test_a_source_of_one_class_has_no_auroc() -> None:
    results = measure(ITEMS, np.array([0.9, 0.1, 0.1, 0.9]), "rude", 0.5)
    assert math.isnan(results[1].auroc)
    assert results[1].to_dict()["auroc"] is None


def test_bias_is_told_per_group() -> None:
    found = group_bias(ITEMS, np.array([0.9, 0.1, 0.1, 0.9]), 0.5)
    assert (found["cats"]["recall"], found["cats"]["false_positives"]) == (1.0, 0.0)
    assert found["dogs"]["false_positives"] == 1.0


def test_evasion_counts_only_what_was_flagged_before() -> None:
    changes = {
        "hide": lambda text, seed: text.replace("rude", "r**e"),
        "shout": lambda text, seed: text.upper(),
    }
    found = evasion(WordCheck(), ["rude", "subtle"], ["kind", "nice"], "rude", 0.5, changes)
    assert found["hide"] == {"still_flagged": 0.0, "false_positive_rise": 0.0}
    assert found["shout"] == {"still_flagged": 1.0, "false_positive_rise": 0.0}


def test_ranked_pairs_counts_strict_order() -> None:
    assert ranked_pairs(np.array([0.9, 0.5, 0.2]), np.array([0.1, 0.5, 0.3])) == pytest.approx(1 / 3)


def test_evaluation_takes_the_standard_operating_point() -> None:
    found = evaluate(WordCheck(), ITEMS, "rude")
    assert found.threshold == 0.6
    assert found.results[-1].recall == 0.5


def test_evaluation_falls_back_to_one_half_only_where_there_is_no_point() -> None:
    assert evaluate(WordCheck(), ITEMS, "long").threshold == 0.5
    assert evaluate(WordCheck(), ITEMS, "rude", threshold=0.3).threshold == 0.3


def test_evaluation_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        evaluate(WordCheck(), [], "rude")


def test_evaluation_is_plain_strict_json() -> None:
    report = evaluate(WordCheck(), ITEMS, "rude").to_dict()
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_tables_name_sources_and_groups() -> None:
    text = evaluate(WordCheck(), ITEMS, "rude").to_markdown()
    assert "| letters | rude | 2 | 1 | 0.750 | 0.500 | 0.000 |" in text
    assert "| cats | 2 | 0.000 | 1.000 | 1.000 |" in text


def test_table_leaves_unknown_cells_empty() -> None:
    text = table(measure([Item("x", True)], np.array([0.9]), "rude", 0.5))
    assert "| - | rude | 1 | 0 |  | 1.000 |  |  |" in text


def test_items_are_read_with_source_and_groups(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(
        '{"text": "x", "label": 1, "source": "s", "groups": ["cats"]}\n\n{"text": "y", "label": 0}\n', "utf-8"
    )
    assert read_items(path) == [Item("x", True, "s", ("cats",)), Item("y", False)]


@pytest.mark.parametrize("row", [{"text": "x"}, {"text": 1, "label": 1}, {"text": "x", "label": 3}, [1]])
def test_a_wrong_row_is_named_by_its_line(tmp_path: Path, row: object) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1 of items\.jsonl must have text and label 0 or 1"):
        read_items(path)


def test_groups_must_be_names(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text('{"text": "x", "label": 1, "groups": "cats"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="groups must be a list of names"):
        read_items(path)
