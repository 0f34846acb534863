from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from safeguard.errors import PackError
from safeguard.train.unidetox.config import Lora, Tuning
from safeguard.train.unidetox.tuning import (
    IGNORED,
    collate,
    encode,
    order,
    rate_at,
    steps_of,
    token_loss,
    tune,
)
from tests.adapters.tiny_lm import tiny_llama, tiny_tokenizer
from tests.train.tiny_detox import KIND


def settings(**fields: object) -> Tuning:
    return Tuning.model_validate(
        {"learning_rate": 1e-2, "batch_size": 2, "steps": 4, "max_tokens": 16, "precision": "no", **fields}
    )


def test_padding_is_not_learned() -> None:
    ids, mask, labels = collate([[5, 6, 7], [8, 9]], 2)
    assert ids.tolist() == [[5, 6, 7], [8, 9, 2]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert labels.tolist() == [[5, 6, 7], [8, 9, IGNORED]]


def test_compatible_padding_is_learned_up_to_the_longest_text() -> None:
    ids, mask, labels = collate([[8, 9]], 2, width=4, unmasked_padding=True)
    assert mask.tolist() == [[1, 1, 0, 0]]
    assert labels.tolist() == ids.tolist() == [[8, 9, 2, 2]]


def test_loss_is_the_sum_over_known_labels() -> None:
    # uniform logits over 4 tokens: every one of the two known labels costs log 4
    labels = torch.tensor([[0, 1, 2, IGNORED]])
    assert token_loss(torch.zeros(1, 4, 4), labels).item() == pytest.approx(2 * math.log(4))


def test_end_token_follows_uncut_texts_only() -> None:
    tokenizer = tiny_tokenizer()
    rows = encode(tokenizer, ["ab", "abcdef"], 4, start=[1], append_end=True)
    assert rows[0] == [1, *tokenizer("ab")["input_ids"], tokenizer.eos_token_id]
    assert rows[1] == [1, *tokenizer("abc")["input_ids"]]


def test_texts_without_two_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="two tokens or more"):
        encode(tiny_tokenizer(), ["", "a"], 8)


def test_learning_rate_rises_and_then_falls_to_nothing() -> None:
    # 2 warm-up steps of 10: 0.5, 1; then (10 - step) / 8 of it
    some = settings(learning_rate=1.0, warmup_fraction=0.2)
    assert [rate_at(step, 10, some) for step in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.125]


def test_every_epoch_has_each_text_once_in_an_order_of_its_own() -> None:
    numbers = list(islice(order(5, 3), 10))
    assert sorted(numbers[:5]) == sorted(numbers[5:]) == [0, 1, 2, 3, 4]
    assert numbers[:5] != numbers[5:]


def test_epochs_become_steps() -> None:
    # 6 epochs of 10084 texts in batches of 4 are the published 15126 steps
    assert steps_of(settings(steps=None, epochs=6, batch_size=4), 10084) == 15126


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    found = tune(tiny_llama(tokenizer), tokenizer, KIND, settings(steps=20), tmp_path)
    assert found.losses[-1] < found.losses[0] - 0.5


def test_texts_of_like_length_are_read_together(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model, read = tiny_llama(tokenizer), []
    model.register_forward_pre_hook(
        lambda _, args, named: read.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    # one byte is one token: one step reads two texts of 2 and two of 8, whatever their order, without padding
    texts = ["ab", "abcdefgh", "cd", "ijklmnop"]
    for seed in range(4):
        one = settings(steps=1, batch_size=4, micro_batch_size=2, seed=seed)
        tune(model, tokenizer, texts, one, tmp_path / str(seed))
    assert read == [(2, 2), (2, 8)] * 4


def test_interrupted_run_gives_the_weights_of_an_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    whole = tune(tiny_llama(tokenizer), tokenizer, KIND, settings(checkpoint_every=2), tmp_path / "a")
    with monkeypatch.context() as patch:
        patch.setattr("safeguard.train.unidetox.tuning.rate_at", _stops_at(3))
        with pytest.raises(KeyboardInterrupt):
            tune(tiny_llama(tokenizer), tokenizer, KIND, settings(checkpoint_every=2), tmp_path / "b")
    again = tune(tiny_llama(tokenizer), tokenizer, KIND, settings(checkpoint_every=2), tmp_path / "b")
    assert again.losses == whole.losses
    for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)


def _stops_at(last: int) -> object:
    def rate(step: int, steps: int, some: Tuning) -> float:
        if step == last:
            raise KeyboardInterrupt
        return rate_at(step, steps, some)

    return rate


def test_checkpoint_of_other_texts_is_refused(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tune(tiny_llama(tokenizer), tokenizer, KIND, settings(), tmp_path)
    with pytest.raises(PackError, match="other settings, texts or models"):
        tune(tiny_llama(tokenizer), tokenizer, KIND[:2], settings(), tmp_path)


def test_small_batches_in_parts_give_the_same_steps(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    whole = tune(tiny_llama(tokenizer), tokenizer, KIND, settings(), tmp_path / "a")
    parts = tune(tiny_llama(tokenizer), tokenizer, KIND, settings(micro_batch_size=1), tmp_path / "b")
    assert parts.losses == pytest.approx(whole.losses, abs=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_lora_is_merged_into_ordinary_weights_and_kept_beside_them(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    origin = tiny_llama(tokenizer)
    before = origin.model.layers[0].mlp.up_proj.weight.detach().clone()
    some = settings(lora=Lora(rank=2), keep_at=(2,))
    found = tune(origin, tokenizer, KIND, some, tmp_path, name="owner/goose")
    assert type(found.model).__name__ == "LlamaForCausalLM"
    assert not torch.equal(found.model.model.layers[0].mlp.up_proj.weight, before)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["r"]) == ("owner/goose", 2)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_models_of_the_steps_asked_for_are_kept(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    found = tune(tiny_llama(tokenizer), tokenizer, KIND, settings(keep_at=(2,)), tmp_path)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path / "step-2")
    assert not torch.equal(kept.lm_head.weight, found.model.lm_head.weight)
