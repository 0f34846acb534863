from __future__ import annotations

from safeguard.train.benign_prompts import _table, code_rows, long_rows
from safeguard.train.text_data import HEADS


def test_code_is_harmless_for_every_head_but_images() -> None:
    row = code_rows(count=1)[0]
    assert set(row.targets) == {label for head in ("llm", "jailbreak", "toxicity") for label in HEADS[head]}
    assert set(row.targets.values()) == {0.0}


def test_same_seed_gives_the_same_code() -> None:
    assert [r.text for r in code_rows(count=5, seed=2)] == [r.text for r in code_rows(count=5, seed=2)]


def test_validation_uses_other_modules_and_other_requests() -> None:
    train, validation = _table()["train"], _table()["validation"]
    assert not set(train["modules"]) & set(validation["modules"])
    assert not set(train["requests"]) & set(validation["requests"])


def test_modules_that_are_gone_from_newer_pythons_are_left_out() -> None:
    assert len(code_rows("validation", count=20)) > 10


def test_long_prompts_join_several_requests() -> None:
    rows = long_rows(count=20)
    assert len(rows) == 20
    assert min(len(r.text) for r in rows) > 30
