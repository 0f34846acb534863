from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

pytest.importorskip("onnx", reason="onnx is not installed (extra export)")

Run = Callable[..., Result]


def test_a_repository_is_written(run: Run, pack: Path, tmp_path: Path) -> None:
    done = run("export", "triton", pack, tmp_path / "models", "--max-rows", "4", "--no-views", "--json")

    said = json.loads(done.stdout)
    assert done.exit_code == 0
    assert said["labels"] == ["toxic"]
    assert (tmp_path / "models" / "rude-words" / "config.pbtxt").is_file()
    assert "max_batch_size: 4\n" in (tmp_path / "models" / "rude-words_model" / "config.pbtxt").read_text()
    step = (tmp_path / "models" / "rude-words_tokenizer" / "config.pbtxt").read_text()
    assert 'key: "views" value { string_value: "false" }' in step


def test_what_was_written_is_said(run: Run, pack: Path, tmp_path: Path) -> None:
    done = run("export", "triton", pack, tmp_path / "models", "--device", "gpu")

    assert done.stdout.startswith(f"{tmp_path / 'models'}: rude-words 1, float32\n")
    assert "1 labels" in done.stdout


def test_a_repository_that_is_there_stays(run: Run, pack: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()

    done = run("export", "triton", pack, tmp_path / "models")

    assert done.exit_code == 2
    assert "is there already" in done.stderr


def test_sizes_must_be_numbers(run: Run, pack: Path, tmp_path: Path) -> None:
    done = run("export", "triton", pack, tmp_path / "models", "--preferred", "8,many")

    assert done.exit_code == 2
    assert "sizes must be whole numbers such as 16,32,64, got '8,many'" in done.stderr
