"""`safeguard evaluate classifier`: the table per source, from any labelled JSONL."""

from __future__ import annotations

import json
from collections.abc import Callable
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


@pytest.fixture
def rude_lines(tmp_path: Path) -> Path:
    rows = [("so rude", 1), ("good", 1), ("good day", 0), ("day", 0)]
    path = tmp_path / "rude.jsonl"
    path.write_text("\n".join(json.dumps({"text": t, "label": y}) for t, y in rows), encoding="utf-8")
    return path


def test_evasion_of_a_check_is_one_json_object_with_seed_and_digests(
    run: Run, pack: Path, rude_lines: Path
) -> None:
    arguments = ("evaluate", "evasion", rude_lines, "--check", pack, "--json", "--seed", "3")
    report = json.loads(run(*arguments, "--only", "base64", "--only", "tags").stdout)

    assert (report["seed"], report["recall"], report["false_positives"]) == (3, 0.5, 0.0)
    assert (len(report["digest"]), len(report["data"])) == (64, 64)
    assert [(row["transformation"], row["kept"]) for row in report["rows"]] == [
        ("base64", 1.0),
        ("tags", 1.0),
    ]


def test_evasion_of_a_policy_counts_what_it_acts_on(
    run: Run, write_policy: Callable[..., Path], rude_lines: Path
) -> None:
    result = run(
        "evaluate", "evasion", rude_lines, "--policy", write_policy(), "--only", "hex", "--limit", "1"
    )

    assert "policy tiny, llm, seed 0" in result.stdout
    assert "| hex | 1 | 1.000 | 1 | 0.000 | 1.000 | 0 |" in result.stdout


def test_evasion_of_what_a_policy_cannot_judge_is_counted(
    run: Run, write_policy: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": "day " * 40, "label": 0}), encoding="utf-8")  # max_chars is 100
    result = run("evaluate", "evasion", path, "--policy", write_policy(), "--only", "bidi", "--json")

    assert json.loads(result.stdout)["unjudged"] == 1


@pytest.mark.parametrize("judges", [(), ("--check", "blocklist:x", "--policy", "strict")])
def test_evasion_wants_a_check_or_a_policy(run: Run, rude_lines: Path, judges: tuple[str, ...]) -> None:
    result = run("evaluate", "evasion", rude_lines, *judges)

    assert (result.exit_code, result.stderr) == (2, "error: give either --check or --policy\n")


def test_evasion_under_an_unknown_label_or_transformation_names_the_known_ones(
    run: Run, pack: Path, rude_lines: Path
) -> None:
    label = run("evaluate", "evasion", rude_lines, "--check", pack, "--label", "wild")
    name = run("evaluate", "evasion", rude_lines, "--check", pack, "--only", "morse")

    assert "has no label 'wild'; known: toxic" in label.stderr
    assert "no transformation named 'morse'; known: base64" in name.stderr
