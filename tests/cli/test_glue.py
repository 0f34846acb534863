"""The commands that only hand their options on: what they refuse, and that what they call is there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run


def test_the_demo_refuses_to_show_nothing(run: Run, tmp_path: Path) -> None:
    result = run("demo", "--no-texts", "--no-images", "--output", tmp_path / "out")

    assert result.exit_code == 2
    assert result.stderr.startswith("error: nothing to show")


def test_the_demo_takes_a_preset_or_a_policy(run: Run) -> None:
    result = run("demo", "--preset", "strict", "--policy", "mine.yaml")

    assert result.exit_code == 2
    assert "give --preset or --policy, not both" in result.stderr


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text("steps = 1\n", encoding="utf-8")
    return path


@pytest.mark.slow
def test_training_refuses_a_folder_with_a_run_in_it(run: Run, tmp_path: Path, recipe: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    options = ("--config", recipe, "--data", tmp_path, "--out", tmp_path / "out")
    result = run("train", "classifier", *options)

    assert result.exit_code == 2
    assert "holds a run already; give a new folder, or --resume to go on with it" in result.stderr


@pytest.mark.slow
def test_training_names_a_wrong_key_of_the_recipe(run: Run, tmp_path: Path, recipe: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    recipe.write_text("stepps = 1\n", encoding="utf-8")
    options = ("--config", recipe, "--data", tmp_path, "--out", tmp_path / "out")
    result = run("train", "classifier", *options)

    assert result.exit_code == 2
    assert "stepps" in result.stderr


def test_training_needs_a_recipe(run: Run) -> None:
    assert run("train", "classifier").exit_code == 2


@pytest.mark.slow
def test_a_second_stage_asks_for_the_run_before(run: Run, tmp_path: Path, recipe: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    recipe.write_text('init = "model.safetensors"\n', encoding="utf-8")
    options = ("--config", recipe, "--data", tmp_path, "--out", tmp_path / "out")
    result = run("train", "classifier", *options)

    assert result.exit_code == 2
    assert "give --init with the folder of the run before" in result.stderr


@pytest.mark.slow
def test_a_pack_needs_a_finished_run(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    result = run("train", "text-guard", tmp_path, tmp_path / "pack", "--data", tmp_path)

    assert result.exit_code != 0
    assert "no metrics.json of a finished run" in result.stderr
    assert not (tmp_path / "pack").exists()
