from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from safeguard.packs import read_pack
from tests.cli.conftest import Run


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Four texts, which the tiny pack tells apart: rude ones are unsafe."""
    rows = [("rude", 1), ("rude day", 1), ("good", 0), ("good day", 0)]
    path = tmp_path / "labelled.jsonl"
    lines = (json.dumps({"text": text, "label": label}) for text, label in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def own_pack(tmp_path: Path, pack: Path) -> Path:
    """A copy of the tiny pack that a test may change."""
    return Path(shutil.copytree(pack, tmp_path / "own"))


def test_recall_is_printed_next_to_the_false_positive_rate(run: Run, pack: Path, labelled: Path) -> None:
    result = run("calibrate", pack, labelled, "--label", "toxic", "--rate", "standard=0.25")

    assert result.exit_code == 0
    assert "toxic: 2 unsafe and 2 harmless texts, AUROC 1.000" in result.stdout
    assert "recall 1.000 at false-positive rate 0.25" in result.stdout


def test_json_holds_the_thresholds_of_all_points(run: Run, pack: Path, labelled: Path) -> None:
    found = json.loads(run("calibrate", pack, labelled, "--label", "toxic", "--json").stdout)

    assert set(found["thresholds"]) == {"lenient", "standard", "strict"}


def test_nothing_is_written_unless_asked_for(run: Run, own_pack: Path, labelled: Path) -> None:
    before = (own_pack / "safeguard.json").read_bytes()
    run("calibrate", own_pack, labelled, "--label", "toxic")

    assert (own_pack / "safeguard.json").read_bytes() == before


def test_write_stores_the_thresholds_in_the_pack(run: Run, own_pack: Path, labelled: Path) -> None:
    run("calibrate", own_pack, labelled, "--label", "toxic", "--rate", "mine=0.1", "--write")

    pack = read_pack(own_pack).verify()
    assert set(pack.manifest.operating_points["mine"]) == {"toxic"}


@pytest.mark.parametrize("rate", ["standard", "standard=2", "standard=x", "=0.1", "standard=nan"])
def test_a_rate_that_is_none_is_refused(run: Run, pack: Path, labelled: Path, rate: str) -> None:
    result = run("calibrate", pack, labelled, "--label", "toxic", "--rate", rate)

    assert result.exit_code == 2
    assert f"--rate must be POINT=RATE with a rate between 0 and 1, got {rate!r}" in result.stderr


def test_only_a_folder_can_be_written(run: Run, labelled: Path) -> None:
    result = run("calibrate", "some-pack", labelled, "--label", "toxic", "--write")

    assert result.exit_code == 2
    assert "--write needs the folder of a pack, got 'some-pack'" in result.stderr


def test_a_label_that_the_check_does_not_give_is_an_error(run: Run, pack: Path, labelled: Path) -> None:
    result = run("calibrate", pack, labelled, "--label", "nix")

    assert result.exit_code == 2
    assert "gives no label 'nix'; it gives toxic" in result.stderr
