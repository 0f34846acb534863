from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from safeguard.cli import app
from safeguard.errors import PackError
from safeguard.evaluate.detox_judges import Judge
from safeguard.evaluate.detox_run import RunConfig, contamination_of_run, evaluate_run
from safeguard.train.unidetox.models import end_tokens, load_lm, start_token, training_start
from safeguard.train.unidetox.stages import make_texts, unidetox
from tests.adapters.tiny_lm import tiny_tokenizer
from tests.train.tiny_detox import write_model, write_pack


def recipe_of(model: Path, **fields: Any) -> RunConfig:
    tuning = {"learning_rate": 1e-2, "batch_size": 2, "steps": 3, "max_tokens": 24, "precision": "no"}
    evaluation = {
        "seeds": [1, 2],
        "continuations": 2,
        "new_tokens": 3,
        "clean_texts": 2,
        "weights": "float32",
    }
    return RunConfig.model_validate(
        {
            "base": str(model),
            "toxic": {**tuning, "append_end": True},
            "distil": {"texts": 3, "tokens": 8, "batch_size": 2, "weights": "float32"},
            "apply": {**tuning, "keep_at": [2]},
            "evaluation": evaluation,
            "reduced": "a test",
            **fields,
        }
    )


@pytest.fixture(autouse=True)
def _level_stays() -> Iterator[None]:
    """The command sets the level of our log, which is the process's."""
    log = logging.getLogger("safeguard")
    before = log.level
    yield
    log.setLevel(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pack(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path, model: Path) -> Path:
    out = tmp_path_factory.mktemp("run")
    unidetox(recipe_of(model).training, data, out)
    return out


def test_all_stages_leave_ordinary_weights_with_cards(run: Path) -> None:
    for name in ("toxic", "detox-own", "detox-published"):
        AutoModelForCausalLM.from_pretrained(run / name)
        assert "a test" in (run / name / "README.md").read_text(encoding="utf-8")
    assert len((run / "texts.jsonl").read_text().splitlines()) == 3


def test_metrics_say_what_decided_the_weights(run: Path) -> None:
    metrics = json.loads((run / "detox-published" / "metrics.json").read_text())
    assert (metrics["steps"], metrics["settings"]["seed"], metrics["reduced"]) == (3, 42, "a test")
    assert len(metrics["losses"]) == 3
    assert [len(digest) for digest in metrics["data"].values()] == [64]


def test_cards_name_no_folder_of_this_machine(run: Path, model: Path) -> None:
    metrics = json.loads((run / "toxic" / "metrics.json").read_text())
    assert metrics["model"] == model.name
    assert str(model) not in (run / "toxic" / "README.md").read_text(encoding="utf-8")


def test_checkpoint_goes_when_the_stage_is_finished(run: Path) -> None:
    assert not (run / "toxic" / "checkpoint").exists()


def test_finished_stages_are_not_made_again(run: Path, data: Path, model: Path) -> None:
    before = (run / "toxic" / "model.safetensors").stat().st_mtime_ns
    unidetox(recipe_of(model).training, data, run)
    assert (run / "toxic" / "model.safetensors").stat().st_mtime_ns == before


def test_other_settings_need_a_new_folder(run: Path, data: Path, model: Path) -> None:
    config = recipe_of(model).changed({"toxic.steps": 4}).training
    with pytest.raises(PackError, match="give a new folder"):
        unidetox(config, data, run, stages=["toxic"])


def test_texts_need_the_toxic_twin(tmp_path: Path, data: Path, model: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run the stage toxic first"):
        make_texts(recipe_of(model).training, data, tmp_path)


def test_another_target_is_detoxified_with_the_published_texts(
    tmp_path: Path, data: Path, model: Path
) -> None:
    other = write_model(tmp_path / "other", seed=9)
    config = recipe_of(model, target=str(other), texts=["published"]).training
    unidetox(config, data, tmp_path / "run", stages=["apply"])
    plain, _ = load_lm(str(other))
    tuned, _ = load_lm(str(tmp_path / "run" / "detox-published"))
    far = [(a - b).abs().max().item() for a, b in zip(plain.parameters(), tuned.parameters(), strict=True)]
    assert 0 < max(far) < 0.2  # 3 steps of 1e-2 from the target's own weights, whose spread is 0.4


def test_successor_rewrites_the_toxic_corpus(tmp_path: Path, data: Path, model: Path) -> None:
    fields = {"method": "hspd", "weights": "float32"}
    rewriting = {"texts": 2, "temperatures": [1.0], "repeats": 1, "new_tokens": 4}
    config = recipe_of(model, distil=fields, rewriting=rewriting).training
    judge = Judge("none", lambda texts: np.zeros(len(texts), np.float32))
    metrics = unidetox(config, data, tmp_path, stages=["toxic", "distil"], toxicity=judge)
    assert metrics["distil"]["texts"] == 2


def test_successor_needs_a_judge(tmp_path: Path, data: Path, model: Path) -> None:
    config = recipe_of(model, distil={"method": "hspd", "weights": "float32"}).training
    with pytest.raises(ValueError, match="give one"):
        unidetox(config, data, tmp_path, stages=["toxic", "distil"])


def test_run_is_measured_in_one_table(run: Path, data: Path, model: Path) -> None:
    judge = Judge("e", lambda texts: np.array([text.count("e") > 0 for text in texts], np.float32))
    contamination_of_run(recipe_of(model).training, data, run)
    results = evaluate_run(recipe_of(model), data, run, [judge])
    names = [(r["name"], r["step"]) for r in results]
    assert names == [
        ("base", None),
        ("toxic twin", None),
        ("detox-own", None),
        ("detox-own", 2),
        ("detox-published", None),
        ("detox-published", 2),
    ]
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Contamination" in page
    assert "detox-published" in page
    assert results[0]["clean"]["drift_nats_per_token"] == pytest.approx(0, abs=1e-6)
    assert results[2]["clean"]["drift_nats_per_token"] > 0


def test_command_line_runs_the_stages_asked_for(tmp_path: Path, data: Path, model: Path) -> None:
    done = CliRunner().invoke(
        app,
        [
            *("train", "unidetox", "--data", str(data), "--out", str(tmp_path / "run"), "--preset", "cpu"),
            *("--base", str(model), "--stage", "toxic", "--set", "toxic.steps=2", "--set", "start=null"),
            *("--set", "toxic.precision=no", "--set", "toxic.batch_size=2"),
        ],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "run" / "toxic" / "metrics.json").read_text())
    assert (metrics["steps"], metrics["preset"]) == (2, "cpu")


def test_evaluation_without_a_judge_is_refused_before_anything_runs(tmp_path: Path, data: Path) -> None:
    done = CliRunner().invoke(app, ["train", "unidetox", "--data", str(data), "--out", str(tmp_path / "run")])
    assert done.exit_code == 2
    assert "evaluation needs a judge" in done.output
    assert not (tmp_path / "run").exists()


def test_start_token_is_bos_unless_asked_for() -> None:
    tokenizer = tiny_tokenizer()
    assert start_token(tokenizer, None) == tokenizer.bos_token_id
    assert training_start(tokenizer, None) == []
    pad = tokenizer.convert_tokens_to_ids("<pad>")
    assert training_start(tokenizer, "<pad>") == [pad]
    assert set(end_tokens(tokenizer, "<pad>")) == {pad, tokenizer.eos_token_id}


def test_start_token_that_the_vocabulary_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="start must be one token"):
        start_token(tiny_tokenizer(), "<|nothing|>")


def test_missing_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="no causal language model could be loaded"):
        load_lm(str(tmp_path))


def test_models_are_loaded_for_evaluation(model: Path) -> None:
    loaded, _ = load_lm(str(model), dtype="bfloat16")
    assert not loaded.training
    assert next(loaded.parameters()).dtype == torch.bfloat16
