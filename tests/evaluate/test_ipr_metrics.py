from __future__ import annotations

import math
from typing import Any

import pytest

from safeguard.evaluate.ipr_metrics import (
    by_category,
    expected_maximum,
    relative_cut,
    rows_of,
    steps_of,
    to_markdown,
)


def stream(*scores: float | None, drawn: bool = True, **more: Any) -> dict[str, Any]:
    """A stream of one round: bare, round 0, round 1, handed out."""
    return {
        "texts": ["a", "b"],
        "drawn": [True, drawn],
        "scores": {"q": list(scores)},
        "similarity": None,
        "text_similarity": [1.0, 0.5],
        "posi": None,
        "i2p": None,
        **more,
    }


def record(*streams: dict[str, Any], category: str = "", near: bool = False) -> dict[str, Any]:
    return {"category": category, "near": near, "streams": list(streams)}


TWO = [
    record(stream(0.9, 0.9, 0.1, 0.1), stream(0.8, 0.8, 0.6, None), category="tools"),
    record(
        stream(0.1, 0.1, 0.1, 0.1, drawn=False), stream(0.7, None, None, None), category="cups", near=True
    ),
]


def row(step: str, subset: str = "all", records: list[dict[str, Any]] = TWO) -> Any:
    found = rows_of(records, {"q": 0.5})
    return next(r for r in found if (r.step, r.subset) == (step, subset))


def test_steps_begin_bare_and_end_with_what_is_handed_out() -> None:
    assert steps_of(TWO) == ["bare", "round 0", "round 1", "handed out"]


def test_ip_of_images_and_of_prompts_are_two_figures() -> None:
    bare = row("bare")
    assert bare.ip_images == {"q": 0.75}  # three of four pictures
    assert bare.ip_prompts == {"q": 1.0}  # both prompts have one
    assert row("round 1").ip_images == {"q": 0.25}
    assert row("round 1").ip_prompts == {"q": 0.5}


def test_what_is_withheld_counts_as_not_inappropriate_and_in_no_mean() -> None:
    handed = row("handed out")
    assert handed.ip_images == {"q": 0.0}
    assert handed.refused == 0.5
    assert handed.pictures == 2
    assert {"q": pytest.approx(0.9)} == handed.CS  # 1 - mean of 0.1 and 0.1


def test_confidence_is_one_minus_the_mean_score() -> None:
    assert row("bare").CS["q"] == pytest.approx(1 - (0.9 + 0.8 + 0.1 + 0.7) / 4)


def test_kept_is_the_share_that_drew_nothing_new_in_a_round() -> None:
    assert row("round 1").kept == pytest.approx(0.25)
    assert math.isnan(row("round 0").kept)


def test_texts_of_a_round_are_compared_with_the_prompt() -> None:
    assert row("round 0").text_similarity == 1.0
    assert row("round 1").text_similarity == 0.5
    assert math.isnan(row("bare").text_similarity)


def test_figures_of_two_papers_are_not_mixed() -> None:
    marked = [record(stream(0.1, 0.1, 0.1, 0.1, posi=[True] * 4, i2p=[False] * 4))]
    bare = row("bare", records=marked)
    assert (bare.IP_posi, bare.IP_i2p, bare.ip_images["q"]) == (1.0, 0.0, 0.0)


def test_without_nudity_neither_figure_is_there() -> None:
    bare = row("bare").to_dict()
    assert bare["IP_posi"] is bare["IP_i2p"] is bare["similarity"] is None


def test_similarity_is_of_pictures_that_there_are() -> None:
    both = [record(stream(0.1, 0.1, 0.1, None, similarity=[0.4, 0.3, 0.2, None]))]
    assert row("round 1", records=both).similarity == 0.2
    assert math.isnan(row("handed out", records=both).similarity)


def test_prompts_near_the_training_data_are_left_out_of_rows_of_their_own() -> None:
    assert row("bare", "decontaminated").streams == 2
    assert row("bare", "decontaminated").ip_images == {"q": 1.0}


def test_categories_are_counted_alone() -> None:
    found = by_category(TWO, "q", 0.5)
    assert found["tools"] == {"bare": 1.0, "round 0": 1.0, "round 1": 0.5, "handed out": 0.0}
    assert list(found) == ["cups", "tools"]


def test_expected_maximum_of_equal_prompts_is_their_share() -> None:
    assert expected_maximum([0.3] * 40) == pytest.approx(0.3)
    assert math.isnan(expected_maximum([]))


def test_expected_maximum_is_near_what_can_be_worked_out() -> None:
    # half of the prompts 1, half 0: 25 draws miss all ones with 0.5 ** 25
    assert expected_maximum([0.0, 1.0]) == pytest.approx(1.0, abs=1e-3)
    # one of a hundred: 1 - 0.99 ** 25 = 0.222
    assert expected_maximum([1.0] + [0.0] * 99) == pytest.approx(0.222, abs=0.015)


def test_relative_cut() -> None:
    assert relative_cut(0.8, 0.2) == pytest.approx(0.75)
    assert math.isnan(relative_cut(0.0, 0.0))


def test_table_has_a_line_for_each_step() -> None:
    lines = to_markdown(rows_of(TWO[:1], {"q": 0.5}), ["q"]).splitlines()
    assert len(lines) == 2 + 4
    assert lines[2].startswith("| all | bare | 2 | 1.000 | 1.000 | 0.150 |")
