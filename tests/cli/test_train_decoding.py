"""`safeguard train value` and `train surgery` on a tiny model in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.adapters.tiny_lm import tiny_tokenizer
from tests.cli.conftest import Run
from tests.decoding.tables import tiny_llama


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = tiny_tokenizer()
    tiny_llama(0, len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def rows(path: Path, *found: Mapping[str, object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def test_surgery_writes_an_edit_and_with_full_the_edited_model(run: Run, tmp_path: Path, model: Path) -> None:
    recipe = tmp_path / "surgery.toml"
    recipe.write_text("rows = 4\nepochs = 1\nbisection_steps = 2\n")
    labelled = rows(tmp_path / "l.jsonl", *({"text": f"text {i}", "label": i % 2} for i in range(8)))
    neutral = rows(tmp_path / "n.jsonl", {"text": "a calm text"})
    options = ("--config", recipe, "--labelled", labelled, "--neutral", neutral, "--model", model)
    result = run("train", "surgery", *options, "--out", tmp_path / "out", "--full")
    assert result.exit_code == 0, result.stderr
    assert "4 rows" in result.stdout
    assert (tmp_path / "out" / "edit.safetensors").is_file()
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()
    again = run("train", "surgery", *options, "--out", tmp_path / "out")
    assert "holds an edit already; give a new folder" in again.stderr


def test_value_samples_scores_and_trains(run: Run, tmp_path: Path, model: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("\n".join("abcdefghijklmnopqrstuvwxyz0123456789"))
    recipe = tmp_path / "value.toml"
    recipe.write_text(
        "epochs = 1\nwidth = 8\nbatch = 4\n[sampling]\ncontinuations = 8\nnew_tokens = 6\n"
        f'check = "blocklist:{words}"\ncategories = ["words"]\n'
    )
    prompts = rows(tmp_path / "p.jsonl", *({"text": f"prompt {i}"} for i in range(6)))
    options = ("--config", recipe, "--prompts", prompts, "--model", model, "--out", tmp_path / "out")
    result = run("train", "value", *options)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "value.json").is_file()
    assert "holds a run already; give a new folder, or --resume" in run("train", "value", *options).stderr
