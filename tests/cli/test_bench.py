from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run

pytest.importorskip("transformers", reason="needs transformers, as the benches do")


def test_too_few_repeats_are_refused(run: Run) -> None:
    result = run("bench", "text", "--repeats", "3")

    assert result.exit_code == 2
    assert "a median here takes 20 runs or more, got 3" in result.stderr


def test_an_unknown_section_is_refused(run: Run) -> None:
    result = run("bench", "speed")

    assert result.exit_code == 2
    assert "no section speed; known: text, image, concurrency, growth" in result.stderr


def test_a_folder_of_peers_must_be_there(run: Run, tmp_path: Path) -> None:
    result = run("bench", "--peers", tmp_path / "none")

    assert result.exit_code == 2
    assert "no such folder of environments" in result.stderr
