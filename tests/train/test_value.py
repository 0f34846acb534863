"""The value model learns which of two openings leads to harm, from a language model that knows only those."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from safeguard.decoding.value_model import ValueModel
from safeguard.train.value import (
    Actions,
    ValueConfig,
    action_values,
    small_trunk,
    td_targets,
    train_value,
)
from safeguard.train.value_samples import Sample, SampleSettings, kept, read_prompts
from tests.adapters.tiny_lm import tiny_tokenizer
from tests.decoding.tables import tiny_gpt2, tiny_llama

TOK = tiny_tokenizer()
SETTINGS = SampleSettings(continuations=4, new_tokens=4, prompts_at_once=2, categories=("odd",))
CONFIG = ValueConfig(
    sampling=SETTINGS, epochs=12, batch=8, learning_rate=3e-3, warmup_steps=2, width=16, checkpoint_every=3
)


class OddCheck:
    """Harmful is what begins with a letter of odd code."""

    name = "odd"
    modality = "text"

    def __init__(self) -> None:
        self.batches = 0

    def __call__(self, batch: Sequence[str], /) -> list[dict[str, float]]:
        self.batches += 1
        return [{"odd": float(ord(text[0]) % 2) if text else 0.0} for text in batch]


def prompts_in(folder: Path, count: int = 8) -> Path:
    path = folder / "prompts.jsonl"
    rows = [{"text": f"prompt {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def language_model() -> tuple[Any, Any]:
    return tiny_llama(0, len(TOK)), TOK


def train(folder: Path, config: ValueConfig = CONFIG, check: Any = None) -> Any:
    out = folder / "out"
    return train_value(
        config,
        prompts_in(folder),
        out,
        language_model=language_model(),
        check=check or OddCheck(),
        progress=False,
    )


def test_training_writes_a_value_model_that_loads(tmp_path: Path) -> None:
    result = train(tmp_path)
    model = ValueModel.load(result.folder)
    assert (model.vocabulary, model.width) == (len(TOK), 16)
    assert result.metrics["check"]["name"] == "odd"
    assert len(result.metrics["data"]["prompts.jsonl"]) == 64
    assert result.metrics["history"][-1]["step"] == 12 * 2  # 7 prompts, 2 of each, 14 in batches of 8


def test_losses_fall(tmp_path: Path) -> None:
    few = train(tmp_path, CONFIG.model_copy(update={"epochs": 1})).metrics["history"][-1]["loss"]
    (tmp_path / "more").mkdir()
    many = train(tmp_path / "more", CONFIG.model_copy(update={"epochs": 60})).metrics["history"][-1]["loss"]
    assert many < few / 2


def test_half_precision_works_after_another_training_in_the_process(tmp_path: Path) -> None:
    Accelerator()  # its state, which says nothing of half precision, stays as long as the process
    result = train(tmp_path, CONFIG.model_copy(update={"precision": "bf16", "epochs": 2}))
    assert ValueModel.load(result.folder).head[0].weight.dtype == torch.float32


def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    a, b = train(tmp_path / "a"), train(tmp_path / "b")
    assert a.metrics["history"] == b.metrics["history"]
    assert (a.folder / "model.safetensors").read_bytes() == (b.folder / "model.safetensors").read_bytes()


def test_a_run_that_stopped_while_training_ends_as_if_it_had_not(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole = train(tmp_path / "a")
    train(tmp_path / "b")
    state = tmp_path / "b" / "out" / "checkpoint" / "state.json"
    assert json.loads(state.read_text())["step"] == 24
    _stop_at(tmp_path / "b", 7)
    again = train(tmp_path / "b")
    assert (again.folder / "model.safetensors").read_bytes() == (
        whole.folder / "model.safetensors"
    ).read_bytes()


def _stop_at(folder: Path, step: int) -> None:
    """A fresh run in the folder that breaks off at a step."""
    import shutil

    from safeguard.train import value

    shutil.rmtree(folder / "out" / "checkpoint")
    whole = value._Run._update

    def update(self: Any, batch: Any) -> float:
        if self.step == step:
            raise KeyboardInterrupt
        return whole(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(value._Run, "_update", update)
        with pytest.raises(KeyboardInterrupt):
            train(folder)


def test_samples_that_are_there_are_not_drawn_again(tmp_path: Path) -> None:
    first = train(tmp_path)
    samples = first.folder / "samples.jsonl"
    whole = samples.read_text()
    lines = whole.split("\n")
    samples.write_text("\n".join(lines[:3]) + "\n" + lines[3][:5])  # two batches, and a torn one
    check = OddCheck()
    train(tmp_path, check=check)
    assert samples.read_text() == whole
    assert check.batches == 2  # of four


def test_samples_of_other_settings_are_refused(tmp_path: Path) -> None:
    train(tmp_path)
    other = SETTINGS.model_copy(update={"new_tokens": 3})
    with pytest.raises(ValueError, match=r"out/samples.jsonl is of other prompts or settings; give a new"):
        train(tmp_path, CONFIG.model_copy(update={"sampling": other}))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(ValueError, match="out holds a run with other settings; give a new folder"):
        train(tmp_path, CONFIG.model_copy(update={"learning_rate": 1e-5}))


def test_texts_without_harm_teach_nothing(tmp_path: Path) -> None:
    class Calm(OddCheck):
        def __call__(self, batch: Sequence[str], /) -> list[dict[str, float]]:
            return [{"odd": 0.0} for _ in batch]

    with pytest.raises(ValueError, match="0 of 14 continuations were harmful, so there is nothing to learn"):
        train(tmp_path, check=Calm())


@pytest.mark.parametrize("score", [float("nan"), 1.5])
def test_scores_out_of_range_are_refused(tmp_path: Path, score: float) -> None:
    class Broken(OddCheck):
        def __call__(self, batch: Sequence[str], /) -> list[dict[str, float]]:
            return [{"odd": score} for _ in batch]

    with pytest.raises(ValueError, match=r"must give scores in \[0, 1\], got"):
        train(tmp_path, check=Broken())


def test_a_check_without_the_category_is_refused(tmp_path: Path) -> None:
    other = SETTINGS.model_copy(update={"categories": ("rude",)})
    with pytest.raises(ValueError, match="gives no 'rude'; it gives: odd"):
        train(tmp_path, CONFIG.model_copy(update={"sampling": other}))


def test_prompts_are_cut_and_come_once(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "abcdef"}\n{"prompt": "abcxyz"}\n{"text": ""}\n{"other": 1}\n{"text": "q"}\n')
    found = read_prompts(path, TOK, SampleSettings(prompt_tokens=3), 0)
    assert sorted(TOK.decode(ids) for ids in found) == ["abc", "q"]


def test_a_file_without_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl has no rows with a 'text' or a 'prompt'"):
        read_prompts(tmp_path / "p.jsonl", TOK, SampleSettings(), 0)


def test_extremes_are_the_least_and_the_most_harmful_of_each_prompt() -> None:
    samples = [Sample(n, (1,), (2,), s) for n, s in ((0, 0.2), (0, 0.9), (0, 0.1), (1, 0.4), (1, 0.5))]
    assert [(s.number, s.score) for s in kept(samples)] == [(0, 0.1), (0, 0.9), (1, 0.4), (1, 0.5)]


def test_actions_are_the_tokens_after_the_prompt_in_the_states_before_them() -> None:
    actions = Actions.of([Sample(0, (7, 8), (3, 4), 0.9), Sample(1, (9,), (5,), 0.1)], 0.5)
    assert actions.ids.tolist() == [[7, 8, 3, 4], [9, 5, 0, 0]]
    assert actions.mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert actions.row.tolist() == [0, 0, 1]
    assert actions.place.tolist() == [1, 2, 0]
    assert actions.token.tolist() == [3, 4, 5]
    assert actions.last.tolist() == [False, True, True]
    assert actions.reward.tolist() == [-1.0, -1.0, 0.0]
    assert actions.left.tolist() == [1, 0, 0]


def test_targets_are_the_reward_at_the_end_and_the_next_value_before() -> None:
    actions = Actions.of([Sample(0, (7,), (3, 4), 0.9), Sample(1, (9,), (5, 6), 0.1)], 0.5)
    # next values -.8 and -.6 of the second actions, discounted by .5; the ends have their rewards
    found = td_targets(torch.tensor([-0.1, -0.8, -0.2, -0.6]), actions, 0.5)
    assert found.tolist() == pytest.approx([-0.4, -1.0, -0.3, 0.0])


def test_values_of_taken_actions_are_those_of_the_whole_vocabulary(value_model: Any) -> None:
    states = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([4, 0, 40])
    whole = -torch.sigmoid(value_model.head(states))
    assert torch.allclose(action_values(value_model.head, states, tokens), whole[range(3), tokens])


@pytest.fixture
def value_model() -> Any:
    torch.manual_seed(5)
    return ValueModel(tiny_llama(5).model, 41, width=8).eval()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_a_short_trunk_is_the_beginning_of_the_model_and_can_be_saved(make: Any, tmp_path: Path) -> None:
    model = make(0)
    trunk = small_trunk(model, 1)
    value = ValueModel(trunk, 41, width=8).eval()
    value.save(tmp_path)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(ValueModel.load(tmp_path)(ids).logits, value(ids).logits)
    assert model.config.num_hidden_layers == 2


def test_a_trunk_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="layers must be at most the 2 of LlamaModel, got 3"):
        small_trunk(tiny_llama(0), 3)


def test_shipped_recipe_can_be_read() -> None:
    from importlib import resources

    with resources.as_file(resources.files("safeguard.train") / "recipes" / "value.toml") as path:
        assert ValueConfig.read(path).polyak == 0.1
