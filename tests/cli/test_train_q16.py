from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

pytest.importorskip("onnx", reason="onnx is not installed (extra export)")
pytest.importorskip("torch", reason="torch is not installed (extra train)")

from safeguard.cli import app
from safeguard.packs import resolve
from tests.tiny_packs import red_pack
from tests.train.tiny_pictures import write_pictures

RECIPE = Path(__file__).parent.parent.parent / "safeguard" / "train" / "recipes" / "q16.toml"


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["train", "q16", *map(str, arguments)])
    return found.exit_code, found.output


def test_one_command_trains_a_head_and_packs_it(tmp_path: Path) -> None:
    pictures, encoder = write_pictures(tmp_path / "pictures"), red_pack(tmp_path / "red")
    out = tmp_path / "out"
    options = ("--encoder", encoder, "--pictures", pictures, "--out", out, "--epochs", 5, "--pack")
    code, said = run("--config", RECIPE, *options)
    assert code == 0, said
    assert "held out AUROC 1.000, recall 1.000, false positives 0.000" in said
    assert json.loads((out / "metrics.json").read_text())["config"]["epochs"] == 5
    assert resolve(out / "pack").manifest.labels == ("inappropriate",)


def test_labels_that_are_not_there_are_named(tmp_path: Path) -> None:
    code, said = run(
        "--config", RECIPE, "--encoder", red_pack(tmp_path / "r"), "--pictures", tmp_path, "--out", tmp_path
    )
    assert code == 2
    assert "no labels.jsonl or labels.csv in it; give --labels" in said


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    code, said = run("--config", RECIPE, "--encoder", "x", "--pictures", tmp_path / "none", "--out", tmp_path)
    assert code == 2
    assert "no such folder" in said


def test_prompts_that_are_not_there_are_named(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", ("train",))
    options = ("--encoder", "x", "--pictures", pictures, "--out", tmp_path, "--start", tmp_path / "none")
    code, said = run("--config", RECIPE, *options)
    assert code == 2
    assert "no such file of prompts" in said
