from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safeguard.cli import app
from tests.train.tiny_refiner import IGNORE_PEFT, base_model, write_pairs

SFT = """
steps = 1
batch_size = 2
precision = "no"
max_tokens = 1024
drop_flagged = false
minimum_similarity = -1.0
validation_rows = 0
lora = { rank = 2 }
"""


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["train", *map(str, arguments)])
    return found.exit_code, found.output


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.filterwarnings(IGNORE_PEFT)
def test_one_command_trains_an_adapter_and_merges_it(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.toml", SFT)
    base, data = base_model(tmp_path / "base"), write_pairs(tmp_path / "pairs.jsonl")
    out = tmp_path / "out"
    options = ("--base", base, "--merge", "--encoder", _encoder())
    code, said = run("refiner-sft", "--config", recipe, "--data", data, "--out", out, *options)
    assert code == 0, said
    assert json.loads((out / "metrics.json").read_text())["steps"] == 1
    assert (out / "merged" / "model.safetensors").is_file()


def _encoder() -> Path:
    from safeguard.errors import PackNotFound
    from safeguard.train.refiner.similarity import find

    try:
        return find()
    except PackNotFound as exc:
        pytest.skip(str(exc))


def test_data_that_is_not_there_is_named(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.toml", SFT)
    code, said = run("refiner-sft", "--config", recipe, "--data", tmp_path / "none", "--out", tmp_path)
    assert code == 2
    assert "no such folder or file" in said


def test_an_unknown_key_of_a_recipe_is_named(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.toml", "learning_rat = 1.0")
    code, said = run("refiner-rl", "--config", recipe, "--data", tmp_path, "--out", tmp_path)
    assert code == 2
    assert "learning_rat" in said


def test_a_picture_reward_says_what_it_needs(tmp_path: Path) -> None:
    recipe = write(tmp_path / "r.toml", 'reward = "pictures"')
    code, said = run("refiner-rl", "--config", recipe, "--data", tmp_path, "--out", tmp_path)
    assert code == 2
    assert "reward 'pictures' needs --pipeline, --q16 and --clip" in said
