from __future__ import annotations

import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from safeguard.decoding.surgery import WeightEdit
from safeguard.train.surgery import SurgeryConfig, fit_probe, perplexity, pooled_states, train_surgery
from tests.adapters.tiny_lm import tiny_tokenizer
from tests.decoding.tables import tiny_llama

TOK = tiny_tokenizer()
CONFIG = SurgeryConfig(epochs=5, learning_rate=1e-2, rows=6, batch=4, bisection_steps=6, most_alpha=8.0)


def files(folder: Path) -> tuple[Path, Path]:
    labelled, neutral = folder / "labelled.jsonl", folder / "neutral.jsonl"
    rows = [{"text": f"zzz {i} zz", "label": 1} for i in range(20)]
    rows += [{"text": f"aaa {i} aa", "label": 0} for i in range(30)] + [{"text": "not known", "label": None}]
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    neutral.write_text("".join(json.dumps({"text": f"a calm text {i}"}) + "\n" for i in range(6)))
    return labelled, neutral


def run(folder: Path, config: SurgeryConfig = CONFIG) -> tuple[Any, Any]:
    model = tiny_llama(0, len(TOK))
    result = train_surgery(
        config, *files(folder), folder / "out", language_model=(model, TOK), progress=False
    )
    return model, result


def test_the_edit_keeps_the_budget_and_the_model_is_left_alone(tmp_path: Path) -> None:
    model, result = run(tmp_path)
    untouched = tiny_llama(0, len(TOK)).state_dict()
    assert all(torch.equal(model.state_dict()[n], v) for n, v in untouched.items())
    before, after = result.metrics["perplexity"]["before"], result.metrics["perplexity"]["after"]
    assert after <= 1.1 * before
    assert result.metrics["texts"] == 40  # twenty of each
    assert result.metrics["rows"] == 6


def test_the_written_edit_can_be_applied_and_reverted(tmp_path: Path) -> None:
    model, result = run(tmp_path)
    edit = WeightEdit.load(tmp_path / "out" / "edit.safetensors")
    assert edit.alpha == result.edit.alpha > 0
    gate = model.model.layers[1].mlp.gate_proj.weight
    edit.apply(model)
    assert not torch.equal(gate, tiny_llama(0, len(TOK)).model.layers[1].mlp.gate_proj.weight)
    edit.revert(model)
    assert torch.equal(
        model.model.layers[0].mlp.gate_proj.weight,
        tiny_llama(0, len(TOK)).model.layers[0].mlp.gate_proj.weight,
    )


def test_a_given_strength_is_taken_without_a_search(tmp_path: Path) -> None:
    _, result = run(tmp_path, CONFIG.model_copy(update={"alpha": 1.08}))
    assert result.edit.alpha == 1.08


def test_rows_are_four_times_the_hidden_size_unless_told(tmp_path: Path) -> None:
    _, result = run(tmp_path, CONFIG.model_copy(update={"rows": None, "alpha": 0.1}))
    assert result.metrics["rows"] == 4 * 16


def test_the_probe_points_to_the_behaviour() -> None:
    states = torch.cat([torch.eye(4)[[0] * 20], torch.eye(4)[[1] * 20]])
    labels = torch.tensor([0] * 20 + [1] * 20)
    direction, _ = fit_probe(states, labels, CONFIG.model_copy(update={"epochs": 50}))
    assert direction[1] > 0 > direction[0]


def test_pooled_states_do_not_depend_on_the_neighbours() -> None:
    model = tiny_llama(0, len(TOK))
    both = pooled_states(model, TOK, ["short", "a much longer text"], CONFIG, progress=False)
    alone = pooled_states(model, TOK, ["short"], CONFIG, progress=False)
    assert torch.allclose(both[:1], alone, atol=1e-5)


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary() -> None:
    model = tiny_llama(0, len(TOK))
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token as likely as another
    assert perplexity(model, TOK, ["one text", "another one"], CONFIG) == pytest.approx(len(TOK))


def test_a_model_that_gives_no_numbers_has_no_perplexity_within_a_budget() -> None:
    model = tiny_llama(0, len(TOK))
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    assert not perplexity(model, TOK, ["one text"], CONFIG) < 1e9


def test_files_without_rows_are_refused(tmp_path: Path) -> None:
    labelled, neutral = files(tmp_path)
    model = tiny_llama(0, len(TOK)), TOK
    (tmp_path / "empty.jsonl").write_text('{"label": 1}\n')
    with pytest.raises(ValueError, match="needs rows with a 'text' and a 'label' of 0 and of 1"):
        train_surgery(CONFIG, tmp_path / "empty.jsonl", neutral, tmp_path / "o", language_model=model)
    with pytest.raises(ValueError, match=r"empty\.jsonl has no rows with a 'text'"):
        train_surgery(CONFIG, labelled, tmp_path / "empty.jsonl", tmp_path / "o", language_model=model)


def test_shipped_recipe_can_be_read() -> None:
    with resources.as_file(resources.files("safeguard.train") / "recipes" / "surgery.toml") as path:
        assert SurgeryConfig.read(path).perplexity_budget == 1.1
