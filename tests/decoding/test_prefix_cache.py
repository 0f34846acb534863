from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from safeguard.decoding.prefix_cache import CachedModel, padding_mask
from tests.decoding.tables import TableModel, prompts, tiny_gpt2, tiny_llama


class Counted:
    """A model that notes how many tokens it read."""

    def __init__(self, model: Any) -> None:
        self.model, self.read = model, 0
        self.training, self.device = False, model.device
        self.forward = model.forward
        self.get_input_embeddings = model.get_input_embeddings

    def __call__(self, **named: Any) -> Any:
        self.read += named["input_ids"].shape[1]
        return self.model(**named)


def alone(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return CachedModel(model, use_cache=False)(ids, mask)


def agrees(cached: CachedModel, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> bool:
    return bool(torch.allclose(cached(ids, mask), alone(model, ids, mask), atol=1e-5))


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_growing_rows_are_read_one_token_at_a_time(make: Any) -> None:
    model = Counted(make(0))
    cached = CachedModel(model)
    batch = prompts("batch")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cached(ids, mask)
    longer = torch.cat([ids, torch.tensor([[3], [4], [5]])], 1)
    wider = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
    assert agrees(cached, model.model, longer, wider)
    assert model.read == 5 + 1


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_reordered_rows_keep_their_own_past(make: Any) -> None:
    model = Counted(make(0))
    cached = CachedModel(model)
    ids = torch.tensor([[1, 7, 9, 4], [1, 7, 8, 6], [1, 5, 5, 5]])
    ones = torch.ones_like(ids)
    cached(ids, ones)
    turned = torch.cat([ids[[1, 1, 0]], torch.tensor([[3], [4], [5]])], 1)
    assert agrees(cached, model.model, turned, torch.ones_like(turned))
    assert model.read == 4 + 1


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_shorter_and_other_rows_are_cut_back_to_what_they_share(make: Any) -> None:
    model = Counted(make(0))
    cached = CachedModel(model)
    ids = torch.tensor([[1, 7, 9, 4, 3, 3]])
    cached(ids, torch.ones_like(ids))
    other = torch.tensor([[1, 7, 9, 8, 6]])
    assert agrees(cached, model.model, other, torch.ones_like(other))
    assert model.read == 6 + 2


def test_more_rows_than_before_take_the_cache_of_their_prompt() -> None:
    model = Counted(tiny_llama(0))
    cached = CachedModel(model)
    ids = torch.tensor([[1, 7, 9, 4]])
    cached(ids, torch.ones_like(ids))
    rows = torch.tensor([[1, 7, 9, 4, 5], [1, 7, 9, 4, 6]])
    assert agrees(cached, model.model, rows, torch.ones_like(rows))
    assert model.read == 4 + 1


def test_another_padding_of_the_same_tokens_is_read_anew() -> None:
    model = tiny_gpt2(0)
    cached = CachedModel(model)
    ids = torch.tensor([[0, 0, 1, 5, 9]])
    cached(ids, torch.ones_like(ids))
    assert agrees(cached, model, ids, (ids != 0).long())


def test_a_padded_row_gives_the_scores_of_the_bare_row() -> None:
    model = tiny_gpt2(0)
    batch = prompts("batch")
    scores = CachedModel(model)(batch["input_ids"], batch["attention_mask"])
    bare = batch["input_ids"][:1, 2:]
    assert torch.allclose(scores[:1], alone(model, bare, torch.ones_like(bare)), atol=1e-5)


def test_asking_twice_gives_the_same_without_reading() -> None:
    model = TableModel([[0.0, 1.0], [2.0, 3.0]])
    cached = CachedModel(model)
    ids = torch.tensor([[0, 1]])
    first = cached(ids, torch.ones_like(ids))
    assert torch.equal(cached(ids, torch.ones_like(ids)), first)
    assert model.asked == [(1, 2)]


def test_threads_at_once_get_the_scores_of_their_own_rows() -> None:
    model = tiny_llama(0)
    cached = CachedModel(model)
    wrong: list[int] = []

    def ask(token: int) -> None:
        ids = torch.tensor([[1, token]])
        for step in range(6):
            if not agrees(cached, model, ids, torch.ones_like(ids)):
                wrong.append(token)
            ids = torch.cat([ids, torch.tensor([[3 + step]])], 1)

    threads = [threading.Thread(target=ask, args=(token,)) for token in (5, 6, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_model_in_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"LlamaForCausalLM is in training mode; call its eval\(\) first"):
        CachedModel(tiny_llama(0).train())


def test_rows_without_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be tokens to continue, got input_ids of shape \(1, 0\)"):
        CachedModel(tiny_llama(0))(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long))


def test_a_token_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="has 41 tokens, got token 41; it must have the vocabulary"):
        CachedModel(tiny_llama(0))(torch.tensor([[1, 41]]), torch.ones(1, 2, dtype=torch.long))


def test_mask_is_repeated_for_the_rows_of_each_prompt_and_grows_with_ones() -> None:
    ids = torch.tensor([[0, 5, 6], [0, 5, 7], [8, 5, 6], [8, 5, 7]])
    given = torch.tensor([[0, 1], [1, 1]])
    assert padding_mask(ids, given, None).tolist() == [[0, 1, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]


def test_leading_padding_is_left_out_but_never_a_whole_row() -> None:
    ids = torch.tensor([[0, 0, 5, 0], [5, 0, 0, 0], [0, 0, 0, 0]])
    assert padding_mask(ids, None, 0).tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 1]]


def test_a_mask_of_another_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="one row per prompt, got 2 for 3 rows"):
        padding_mask(torch.ones(3, 2, dtype=torch.long), torch.ones(2, 2), None)


def tiny_mistral() -> Any:
    """A model that sees four tokens back, and keeps no more of them."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(
        vocab_size=41, num_key_value_heads=2, sliding_window=4, initializer_range=0.6, **sizes
    )
    return MistralForCausalLM(config).eval()


def test_a_sliding_window_is_gone_on_from_but_never_cut_back() -> None:
    model = Counted(tiny_mistral())
    cached = CachedModel(model)
    ids = torch.tensor([[1, 7, 9, 4, 3, 3, 8], [1, 7, 9, 4, 5, 6, 2]])
    cached(ids, torch.ones_like(ids))
    longer = torch.cat([ids.flip(0), torch.tensor([[3], [4]])], 1)
    assert agrees(cached, model.model, longer, torch.ones_like(longer))
    assert model.read == 7 + 1
    shorter = longer[:, :6]
    assert agrees(cached, model.model, shorter, torch.ones_like(shorter))
    assert model.read == 7 + 1 + 6


def test_a_recurrent_model_is_read_anew() -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=41, hidden_size=16, num_hidden_layers=2)).eval()
    cached = CachedModel(model)
    ids = torch.tensor([[1, 7, 9, 4]])
    for step in (ids, torch.cat([ids, torch.tensor([[5]])], 1), ids[:, :3]):
        assert agrees(cached, model, step, torch.ones_like(step))
