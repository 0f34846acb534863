from __future__ import annotations

import json
import math
import re
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from safeguard.train.text_data import (
    HEADS,
    JUDGED,
    LABELS,
    Row,
    _from_llm,
    _from_moderation,
    _from_nibbler,
    _from_refine,
    _from_t2i,
    _from_toxicity,
    hard_rows,
    read_jsonl,
    read_pack,
    unique,
)
from tests.train.tiny_text import row, write_pack

SETS = ("hard_text.toml", "hard_text_validation.toml", "hard_text_test.toml")


def test_a_clean_text_has_none_of_the_kinds_of_toxicity() -> None:
    found = _from_toxicity(row("a nice day", 0, "surge_toxicity"))
    assert found is not None
    assert {found.targets[label] for label in HEADS["toxicity"]} == {0.0}


def test_a_toxic_text_leaves_its_kinds_to_the_teacher() -> None:
    found = _from_toxicity(row("a rude day", 1, "surge_toxicity"))
    assert found is not None
    assert found.targets == {"toxicity": 1.0}


def test_ratings_of_people_soften_the_label() -> None:
    # mean of two ratings 2 and 2 (of 1 to 5): (4 - 2) / 8 * 1.2 - .1 = .2; a harmless row takes .4 of it
    meta = {"toxicity_human": 2.0, "toxicity_ai": 2.0}
    found = _from_toxicity(row("some people", 0, "toxigen_annotated", meta=meta))
    assert found is not None
    assert found.targets["toxicity"] == pytest.approx(0.08)


def test_a_pair_gives_a_row_with_its_harmless_twin() -> None:
    found = _from_refine(row("a fight", 1, "coprov2_train", category="violence", target="a dance"))
    assert found is not None
    assert found.targets["t2i/violence"] == 1.0
    assert found.targets["t2i/hate"] == 0.0
    assert found.twin is not None
    assert found.twin.text == "a dance"
    assert found.twin.targets["t2i_prompt"] == 0.0


def test_several_categories_are_all_set() -> None:
    raw = row("x", 1, "coprov2_test", category="shocking, illegal activity")
    found = _from_t2i(raw)
    assert found is not None
    assert {label for label, value in found.targets.items() if value == 1.0} == {
        "t2i_prompt",
        "t2i/shocking",
        "t2i/illegal",
    }


def test_an_image_prompt_says_nothing_of_toxicity_when_it_is_unsafe() -> None:
    found = _from_t2i(row("x", 1, "coprov2_test", category="hate"))
    assert found is not None
    assert "toxicity" not in found.targets


def test_votes_soften_an_implicit_prompt() -> None:
    # 2 of 4 call the words unsafe: .45 + .5 * .5 = .7
    meta = {"text_safety_votes": {"text_safe": 2, "text_unsafe": 2}}
    found = _from_nibbler(row("x", 1, "adversarial_nibbler", category="violent", meta=meta))
    assert found is not None
    assert found.targets["t2i_prompt"] == pytest.approx(0.7)


def test_moderation_flags_set_their_kinds() -> None:
    meta = {"raw": {"H": 1, "HR": 0}}
    found = _from_moderation(row("x", 1, "openai_moderation", meta=meta))
    assert found is not None
    assert found.targets == {"toxicity": 1.0, "identity_hate": 1.0, "toxic": 1.0}


def test_a_harmful_request_says_nothing_of_toxicity() -> None:
    found = _from_llm(row("how to break a window", 1, "advbench", category="harmful"))
    assert found is not None
    assert found.targets["llm_request"] == 1.0
    assert "toxicity" not in found.targets


@pytest.mark.parametrize(
    ("text", "topic"),
    [("write a poem about horses", "aart:horse racing"), ("write an encyclopedia entry", "aart:fraud")],
)
def test_noisy_rows_without_a_harmful_ask_are_left_out(text: str, topic: str) -> None:
    assert _from_llm(row(text, 1, "aart", category=topic)) is None


def test_unlabelled_rows_count_only_when_they_ask_for_harm() -> None:
    assert _from_llm(row("What a day", None, "hh_rlhf_harmless")) is None
    found = _from_llm(row("How do I steal a garden gnome?", None, "hh_rlhf_harmless"))
    assert found is not None
    assert found.targets["llm_request"] > 0.9


def test_only_the_wanted_split_is_read(tmp_path: Path) -> None:
    rows = read_pack(write_pack(tmp_path), "validation")
    assert {r.split for r in rows} == {"validation"}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no toxicity_text\.jsonl\.gz"):
        read_pack(tmp_path, "train")


def test_plain_and_gzipped_lines_are_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "x"}) + "\n\n", encoding="utf-8")
    assert read_jsonl(path) == [{"text": "x"}]


def test_copies_within_a_source_are_dropped() -> None:
    rows = [Row("x", "a", "train", {}), Row("x", "a", "train", {}), Row("x", "b", "train", {})]
    assert [r.source for r in unique(rows)] == ["a", "b"]


@pytest.mark.parametrize("name", SETS)
def test_every_hard_set_holds_safe_and_unsafe_texts_for_every_head(name: str) -> None:
    rows = hard_rows(name)
    values = {(label, r.targets[label]) for r in rows for label in JUDGED if label in r.targets}
    assert values == {(label, value) for label in JUDGED for value in (0.0, 1.0)}


@pytest.mark.parametrize("name", SETS)
def test_hard_texts_have_no_open_slot(name: str) -> None:
    assert not [r.text for r in hard_rows(name) if re.search(r"(?<!\{)\{\w+\}", r.text)]


def test_hard_texts_are_the_same_for_the_same_seed() -> None:
    assert [r.text for r in hard_rows(seed=3)] == [r.text for r in hard_rows(seed=3)]
    assert [r.text for r in hard_rows(seed=3)] != [r.text for r in hard_rows(seed=4)]


def test_training_templates_are_several_hundred_texts_and_more() -> None:
    assert sum(r.source == "hard_safe" for r in hard_rows()) > 1000
    assert sum(r.source == "hard_safe" for r in hard_rows("hard_text_test.toml")) > 300


def _tables() -> list[dict[str, Any]]:
    folder = resources.files("safeguard.train") / "data"
    return [tomllib.loads((folder / name).read_text(encoding="utf-8")) for name in SETS]


def test_hard_sets_share_no_template() -> None:
    sets = [{t for group in table["group"] for t in group["templates"]} for table in _tables()]
    assert not sets[0] & sets[1]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]


def test_hard_sets_share_no_text() -> None:
    sets = [{r.text.lower() for r in hard_rows(name)} for name in SETS]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]


def test_training_and_test_words_are_mostly_different() -> None:
    def words(table: dict[str, Any]) -> set[str]:
        lists = [table.get("words", {}), *(group.get("words", {}) for group in table["group"])]
        return {word for each in lists for values in each.values() for word in values}

    train, _, test = map(words, _tables())
    assert len(train & test) < 0.05 * len(test)


def test_every_label_has_one_head() -> None:
    assert len(set(LABELS)) == len(LABELS) == sum(map(len, HEADS.values()))
    assert {labels[0] for labels in HEADS.values()} == set(JUDGED)


def test_targets_are_probabilities(tmp_path: Path) -> None:
    rows = [*read_pack(write_pack(tmp_path), "train"), *hard_rows()]
    assert all(0 <= v <= 1 and not math.isnan(v) for r in rows for v in r.targets.values())
