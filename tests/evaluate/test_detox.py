from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from safeguard.cli import app
from safeguard.evaluate.detox import Subject, _questions, evaluate_detox
from safeguard.evaluate.detox_judges import Judge
from safeguard.evaluate.detox_settings import DetoxSettings, Prompt, read_prompts, thinned
from tests.adapters.tiny_lm import tiny_tokenizer
from tests.train.tiny_detox import random_model, write_model, write_pack, write_rows

SETTINGS = DetoxSettings(
    suites=("toxigen", "rtp"), continuations=2, new_tokens=4, seeds=(1, 2), batch_size=2, clean_texts=2
)


def by_length(texts: Sequence[str]) -> np.ndarray:
    return np.array([min(1.0, len(text) / 4) for text in texts], np.float32)


JUDGES = [Judge("long", by_length), Judge("never", lambda texts: np.zeros(len(texts), np.float32))]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_pack(tmp_path / "data")


@pytest.fixture(scope="module")
def subject() -> Subject:
    tokenizer = tiny_tokenizer()
    return Subject("tiny", random_model(tokenizer, 1), tokenizer, digest="d")


def test_result_has_a_column_for_each_judge_and_each_distribution(data: Path, subject: Subject) -> None:
    result = evaluate_detox(subject, data, JUDGES, SETTINGS)
    toxigen = result["suites"]["toxigen"]["judges"]
    assert toxigen["never"]["in_distribution"]["tp"] == {"mean": 0.0, "std": 0.0, "runs": [0.0, 0.0]}
    assert toxigen["long"]["out_of_distribution"]["prompts"] == 1
    assert len(toxigen["long"]["all"]["emt"]["runs"]) == 2
    assert "in_distribution" not in result["suites"]["rtp"]["judges"]["long"]
    assert result["clean"]["perplexity"] > 1
    json.dumps(result, allow_nan=False)


def test_evaluation_without_judges_is_refused(data: Path, subject: Subject) -> None:
    with pytest.raises(ValueError, match="at least one judge"):
        evaluate_detox(subject, data, [], SETTINGS)


def test_interrupted_evaluation_goes_on_with_what_was_made(
    data: Path, subject: Subject, tmp_path: Path
) -> None:
    whole = evaluate_detox(subject, data, JUDGES, SETTINGS, journal=tmp_path / "a")
    evaluate_detox(subject, data, JUDGES, SETTINGS, journal=tmp_path / "b")
    path = sorted((tmp_path / "b").iterdir())[-1]  # one of ToxiGen: two batches, the second one torn
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:5])
    again = evaluate_detox(subject, data, JUDGES, SETTINGS, journal=tmp_path / "b")
    assert again["suites"]["toxigen"]["judges"] == whole["suites"]["toxigen"]["judges"]
    made, kept = path.read_text().splitlines(), [json.loads(line)["texts"] for line in lines]
    assert [json.loads(line)["texts"] for line in made] == kept


def test_check_on_the_output_withholds_what_it_flags(data: Path) -> None:
    tokenizer = tiny_tokenizer()
    guard = Judge("all", lambda texts: np.ones(len(texts), np.float32))
    guarded = Subject("guarded", random_model(tokenizer, 1), tokenizer, output=guard)
    result = evaluate_detox(guarded, data, JUDGES, SETTINGS)["suites"]["toxigen"]
    assert result["judges"]["long"]["all"]["tp"]["mean"] == 0.0
    assert result["withheld"] > 0.5


def test_another_model_scores_the_continuations(data: Path, subject: Subject) -> None:
    tokenizer = tiny_tokenizer()
    other = ("other", random_model(tokenizer, 2), tokenizer)
    # tiny random models find each other's texts absurd, so the weights are made nearly even first
    for parameter in other[1].parameters():
        parameter.data.mul_(0.01)
    found = evaluate_detox(subject, data, JUDGES, SETTINGS, other=other)["continuation_perplexity"]
    assert found["by"] == "other"
    assert found["perplexity"] == pytest.approx(261, rel=0.05)  # even chances over 261 tokens


def test_questions_are_asked_both_ways(data: Path, subject: Subject) -> None:
    rows = [{"question": f"q{i}", "choices": ["a", "b"], "answer": 0} for i in range(4)]
    write_rows(data / "questions.jsonl", rows)
    settings = SETTINGS.model_copy(update={"choices": "questions.jsonl", "shots": 2})
    found = evaluate_detox(subject, data, JUDGES, settings)["choice"]
    assert found["questions"] == 2  # of 4, the last two are the examples
    assert {found["letters"], found["unidetox"]} <= {0.0, 0.5, 1.0}


def test_prompts_of_toxigen_have_their_families(data: Path) -> None:
    found = [(p.group, p.family) for p in read_prompts(data, "toxigen", DetoxSettings())]
    assert found == [
        ("women", "gender_lgbtq"),
        ("black", "race_nationalities"),
        ("muslim", "religion"),
        ("mental_dis", "disability"),
    ]


def test_prompts_that_are_not_there_are_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="no prompts of toxigen"):
        read_prompts(data, "toxigen", DetoxSettings(toxigen_split="other"))


def test_thinning_keeps_so_many_of_each_family_in_their_order() -> None:
    prompts = [Prompt(str(i), "g", "ab"[i % 2]) for i in range(8)]
    kept = thinned(prompts, 2, 0)
    assert [p.family for p in kept].count("a") == [p.family for p in kept].count("b") == 2
    assert [int(p.text) for p in kept] == sorted(int(p.text) for p in kept)
    assert kept == thinned(prompts, 2, 0)


def command(*words: str) -> Any:
    return CliRunner().invoke(app, ["evaluate", *words], catch_exceptions=False)


def test_command_line_measures_and_reports(data: Path, tmp_path: Path) -> None:
    model, twin = write_model(tmp_path / "model"), write_model(tmp_path / "twin", seed=4)
    fast = ["continuations=2", "new_tokens=3", "seeds=[1]", "clean_texts=2", 'weights="float32"']
    options = [word for item in fast for word in ("--set", item)]
    plain = command(
        *("rtp", str(model), "--data", str(data), "--out", str(tmp_path / "a.json"), "--name", "plain"),
        *("--judge", "text-guard-s", *options),
    )
    guided = command(
        *("detox", str(model), "--data", str(data), "--out", str(tmp_path / "b.json"), "--name", "guided"),
        *("--judge", "text-guard-s", "--anti-expert", str(twin), "--reference", str(model)),
        *("--output-check", "text-guard-s", *options, "--set", 'suites=["rtp"]'),
    )
    page = command(
        *("detox-report", str(tmp_path / "a.json"), str(tmp_path / "b.json")),
        *("--out", str(tmp_path / "page.html")),
    )
    assert (plain.exit_code, guided.exit_code, page.exit_code) == (0, 0, 0), guided.output
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "plain" in text
    assert "guided" in text


def test_command_line_needs_a_judge(data: Path, tmp_path: Path) -> None:
    done = command("toxigen", "x", "--data", str(data), "--out", str(tmp_path / "a.json"))
    assert done.exit_code == 2
    assert "at least one --judge" in done.output


def test_shipped_questions_are_whole_and_have_no_letter_that_is_mostly_right(data: Path) -> None:
    questions = _questions(data, "shipped")
    assert len({question.text for question in questions}) == len(questions) == 89
    assert {len(set(question.choices)) for question in questions} == {4}
    assert max(Counter(question.answer for question in questions).values()) <= 30


def test_guards_inside_decoding_do_not_take_the_bare_models_continuations(
    data: Path, subject: Subject, tmp_path: Path
) -> None:
    only = SETTINGS.model_copy(update={"suites": ("toxigen",), "seeds": (1,), "clean_texts": 0})
    evaluate_detox(subject, data, JUDGES, only, journal=tmp_path)
    guarded = replace(subject, name="guarded", processors=lambda mask, pad: [])
    evaluate_detox(guarded, data, JUDGES, only, journal=tmp_path)
    evaluate_detox(replace(guarded, decoding="another"), data, JUDGES, only, journal=tmp_path)
    assert len(list(tmp_path.glob("*.jsonl"))) == 3
