from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safeguard.errors import PackError
from safeguard.train.unidetox.config import Compat, Distil
from safeguard.train.unidetox.corpus import digest_of
from safeguard.train.unidetox.distil import Journal, distil, fault_of, finish, report_on
from tests.adapters.tiny_lm import tiny_tokenizer
from tests.train.tiny_detox import random_model

SETTINGS = Distil(texts=5, tokens=8, batch_size=2, weights="float32", seed=3)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any, Any]:
    tokenizer = tiny_tokenizer()
    return random_model(tokenizer, 1), random_model(tokenizer, 2), tokenizer


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "texts.jsonl").read_text(encoding="utf-8").splitlines()]


def test_texts_are_written_with_digests_in_order(tmp_path: Path, models: tuple[Any, Any, Any]) -> None:
    report = finish(distil(*models, SETTINGS, tmp_path), tmp_path, 5)
    rows = rows_of(tmp_path)
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["sha256"] for row in rows] == [digest_of(row["text"]) for row in rows]
    assert max(row["tokens"] for row in rows) == 7  # 8 with the start token
    assert report["texts"] == 5


def test_interrupted_run_gives_the_texts_of_an_unbroken_one(
    tmp_path: Path, models: tuple[Any, Any, Any]
) -> None:
    finish(distil(*models, SETTINGS, tmp_path / "a"), tmp_path / "a", 5)
    journal = distil(*models, SETTINGS, tmp_path / "b")
    lines = journal.path.read_text(encoding="utf-8").splitlines(keepends=True)
    journal.path.write_text("".join(lines[:2]) + lines[3][:9], encoding="utf-8")  # the last one torn
    finish(distil(*models, SETTINGS, tmp_path / "b"), tmp_path / "b", 5)
    assert rows_of(tmp_path / "b") == rows_of(tmp_path / "a")


def test_texts_do_not_depend_on_how_they_are_shared_out(tmp_path: Path, models: tuple[Any, Any, Any]) -> None:
    finish(distil(*models, SETTINGS, tmp_path / "a"), tmp_path / "a", 5)
    distil(*models, SETTINGS, tmp_path / "b", process=(1, 2))
    finish(distil(*models, SETTINGS, tmp_path / "b", process=(0, 2)), tmp_path / "b", 5)
    assert rows_of(tmp_path / "b") == rows_of(tmp_path / "a")


def test_shared_cache_gives_other_texts(tmp_path: Path, models: tuple[Any, Any, Any]) -> None:
    finish(distil(*models, SETTINGS, tmp_path / "a"), tmp_path / "a", 5)
    shared = distil(*models, SETTINGS, tmp_path / "b", compat=Compat(shared_cache=True))
    finish(shared, tmp_path / "b", 5)
    assert rows_of(tmp_path / "b") != rows_of(tmp_path / "a")


def test_folder_with_texts_of_other_settings_is_refused(tmp_path: Path, models: tuple[Any, Any, Any]) -> None:
    distil(*models, SETTINGS, tmp_path)
    with pytest.raises(PackError, match="other settings or models"):
        distil(*models, SETTINGS.model_copy(update={"alpha": 0.2}), tmp_path)


def test_unfinished_texts_are_not_put_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 of 2 texts are not sampled yet"):
        finish(Journal(tmp_path, "x"), tmp_path, 2)


LONG = "the calm lake lies under a wide morning sky and nobody is there yet"


def test_repeated_and_degenerate_texts_are_reported_by_number() -> None:
    texts = [LONG, "  The calm " + LONG[9:].upper(), "two words", "", "la " * 20, "1 + 2 = 3 ; " * 4]
    assert report_on(texts) == {
        "duplicates": [1],
        "degenerate": {"short": [2], "empty": [3], "repetitive": [4, 5]},
    }


def test_text_of_few_letters_is_garbled() -> None:
    assert fault_of("1;2 3#4 5!6 7?8 9-0 a=1 b>2 c<3 d*4 e&5 f%6") == "garbled"
    assert fault_of(LONG) is None


def test_degenerate_texts_can_be_dropped(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "x")
    for i, text in enumerate([LONG, "short one"]):
        journal.add({"index": i, "text": text, "tokens": 3, "ended": True, "sha256": digest_of(text)})
    assert finish(journal, tmp_path, 2, drop_degenerate=True)["dropped"] == 1
    assert [row["text"] for row in rows_of(tmp_path)] == [LONG]
