"""`safeguard evaluate classifier`: the table per source, from any labelled JSONL."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Two sources; the tiny pack flags `rude`, so it is right on `a` and flags the harmless half of `b`."""
    rows = [("rude", 1, "a"), ("good", 0, "a"), ("rude", 0, "b"), ("day", 0, "b"), ("good", 1, "b")]
    path = tmp_path / "labelled.jsonl"
    lines = (json.dumps({"text": text, "label": label, "source": source}) for text, label, source in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_json_has_recall_beside_false_positives_per_source(run: Run, pack: Path, labelled: Path) -> None:
    report = json.loads(run("evaluate", "classifier", pack, labelled, "--label", "toxic", "--json").stdout)
    rows = {row["source"]: row for row in report["results"]}
    assert (rows["a"]["recall"], rows["a"]["false_positives"]) == (1.0, 0.0)
    assert (rows["b"]["recall"], rows["b"]["false_positives"]) == (0.0, 0.5)


def test_table_is_printed(run: Run, pack: Path, labelled: Path) -> None:
    result = run("evaluate", "classifier", pack, labelled, "--label", "toxic", "--threshold", "0.5")
    assert result.exit_code == 0
    assert "toxic at 0.500" in result.stdout


def test_evasion_table_names_every_disguise(run: Run, pack: Path, labelled: Path) -> None:
    from safeguard.train.augment import DISGUISES

    result = run("evaluate", "classifier", pack, labelled, "--label", "toxic", "--evasion", "--json")
    assert set(json.loads(result.stdout)["evasion"]) == set(DISGUISES)


def test_unknown_label_names_the_known_ones(run: Run, pack: Path, labelled: Path) -> None:
    result = run("evaluate", "classifier", pack, labelled, "--label", "violence")
    assert result.exit_code == 2
    assert "has no label 'violence'; known: toxic" in result.stderr


def test_line_without_a_label_is_named(run: Run, pack: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": "b"}\n', encoding="utf-8")
    result = run("evaluate", "classifier", pack, path, "--label", "toxic")
    assert result.exit_code == 2
    assert "line 2 of bad.jsonl must have text and label 0 or 1" in result.stderr
