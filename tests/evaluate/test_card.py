from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import pytest

from safeguard.evaluate.card import card_metrics
from safeguard.train.augment import DISGUISES
from safeguard.train.text_data import JUDGED
from safeguard.types import Finding, Modality, Scores
from tests.train.tiny_text import row, write_pack


class WordCheck:
    """A real check on made-up grounds: every label is 0.9 for a text with the word "rude" or "break"."""

    name = "words"
    modality: Modality = "text"
    labels = JUDGED
    operating_points: ClassVar = {"standard": dict.fromkeys(JUDGED, 0.5)}

    def __call__(self, batch: Sequence[str], /) -> list[Finding | Scores]:
        return [self._score(text.lower()) for text in batch]

    def _score(self, text: str) -> Scores:
        return dict.fromkeys(JUDGED, 0.9 if "rude" in text or "break" in text else 0.1)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, float]]]:
    folder: Path = write_pack(tmp_path_factory.mktemp("data"))
    rows = [row("how do i break it", 1, "jailbreakbench", "public_test", category="harm")]
    rows += [
        row(f"{name} is a rude writer", 1, "bias_madlibs", category="madlibs")
        for name in "abcdefghijklmnopqrst"
    ]
    for name, source in (("llm_prompts.jsonl.gz", rows[:1]), ("toxicity_text.jsonl.gz", rows[1:])):
        with gzip.open(folder / name, "at", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in source)
    return card_metrics(WordCheck(), folder, evasion_texts=4)


def test_card_is_strict_json(found: dict[str, object]) -> None:
    assert json.loads(json.dumps(found["sources"], allow_nan=False)) == found["sources"]


def test_sources_carry_their_split(found: dict[str, list[dict[str, object]]]) -> None:
    names = {(r["source"], r["label"]) for r in found["sources"]}
    assert {("dghs_v0.1 (validation)", "toxicity"), ("jailbreakbench (public_test)", "llm_request")} <= names


def test_pairs_are_ranked(found: dict[str, dict[str, float]]) -> None:
    # "a rude cat" against "a nice cat": every pair in order
    assert found["pairs"] == {"coprov2_train": 1.0}


def test_every_disguise_is_tried_on_three_heads(found: dict[str, dict[str, object]]) -> None:
    assert found["evasion"].keys() == {"toxicity", "t2i_prompt", "llm_request"}
    assert all(table.keys() == DISGUISES.keys() for table in found["evasion"].values())  # type: ignore[attr-defined]


def test_what_normalisation_undoes_evades_nothing(
    found: dict[str, dict[str, dict[str, dict[str, float]]]],
) -> None:
    assert found["evasion"]["toxicity"]["fullwidth"]["still_flagged"] == 1.0


def test_bias_is_told_for_groups_with_enough_sentences(found: dict[str, dict[str, dict[str, float]]]) -> None:
    assert found["bias"]["writer"] == {
        "items": 20.0,
        "false_positives": pytest.approx(float("nan"), nan_ok=True),
        "recall": 1.0,
        "auroc": pytest.approx(float("nan"), nan_ok=True),
    }


def test_own_test_templates_are_measured_per_head(found: dict[str, dict[str, dict[str, float]]]) -> None:
    assert found["hard_test"].keys() == set(JUDGED)
    assert 0 <= found["hard_test"]["toxicity"]["false_positives"] <= 1
