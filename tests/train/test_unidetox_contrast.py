from __future__ import annotations

import math

import pytest
import torch

from safeguard.train.unidetox.contrast import Twins, contrast, draw, pick, sample, soft_contrast
from tests.adapters.tiny_lm import tiny_tokenizer
from tests.train.tiny_detox import random_model

BASE = torch.tensor([[3.0, 2.0, 1.0, 0.5, -2.0]])
TOXIC = torch.tensor([[3.5, 0.0, 1.0, 2.5, -9.0]])
NO = -math.inf


def test_pure_difference_among_plausible_tokens() -> None:
    # log 0.1 = -2.303, so the cut is 3 - 2.303 = 0.697: tokens 0, 1, 2 stay; base - toxic there
    assert contrast(BASE, TOXIC, alpha=0.1, beta=math.inf).tolist() == [[-0.5, 2.0, 0.0, NO, NO]]


def test_general_form_weighs_both_models() -> None:
    # beta = 1: 2 base - toxic = 6 - 3.5, 4 - 0, 2 - 1
    assert contrast(BASE, TOXIC, alpha=0.1, beta=1.0).tolist() == [[2.5, 4.0, 1.0, NO, NO]]


def test_alpha_of_one_leaves_only_the_likeliest_token() -> None:
    assert contrast(BASE, TOXIC, alpha=1.0, beta=math.inf).isfinite().tolist() == [[True, *[False] * 4]]


def test_soft_contrast_lowers_the_tokens_that_gain_most() -> None:
    # p_base = (1/2, 1/4, 1/4), p_toxic = (1/4, 1/2, 1/4): D = sqrt(1/16 + 1/16) = 0.353553
    # t = log(1.353553) = 0.302733, a = 0.302733 / 1.302733 = 0.232383; only token 1 gains
    base, toxic = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[1.0, 2.0, 1.0]]).log()
    found = soft_contrast(base, toxic, least_k=1)
    assert found[0, 1].item() == pytest.approx(0.0 - 0.232383 * math.log(2), abs=1e-5)
    assert found[0, [0, 2]].tolist() == base[0, [0, 2]].tolist()


def test_soft_contrast_lowers_at_most_k_tokens() -> None:
    # a is 0.17 at most for 4 tokens that differ this little, so k = max(least_k, floor(4 a)) = least_k = 1
    base = torch.tensor([[4.0, 1.0, 1.0, 1.0]]).log()
    toxic = torch.tensor([[3.0, 1.5, 1.2, 1.0]]).log()
    changed = soft_contrast(base, toxic, least_k=1) != base
    assert changed.tolist() == [[False, True, False, False]]


def test_pick_takes_the_token_whose_share_holds_the_number() -> None:
    # shares 0.5, 0.3, 0.2: 0.1 falls into the first, 0.79 into the second, 0.81 into the third
    scores = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(3, 1)
    assert pick(scores, torch.tensor([0.1, 0.79, 0.81])).tolist() == [0, 1, 2]


def test_pick_never_takes_a_banned_token() -> None:
    scores = torch.tensor([[NO, 0.0, NO]]).repeat(2, 1)
    assert pick(scores, torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64)).tolist() == [1, 1]


def test_top_k_leaves_the_others_out() -> None:
    scores = torch.tensor([[0.1, 0.5, 0.4]]).log()
    assert pick(scores, torch.tensor([0.999]), top_k=2).tolist() == [2]


def test_pick_refuses_scores_that_are_no_numbers() -> None:
    with pytest.raises(ValueError, match="scores must be numbers"):
        pick(torch.tensor([[math.nan, 0.0]]), torch.tensor([0.5]))


def test_numbers_of_a_text_depend_on_seed_and_number_alone() -> None:
    assert torch.equal(draw(7, 3, 5), draw(7, 3, 9)[:5])
    assert not torch.equal(draw(7, 3, 5), draw(7, 4, 5))


def test_two_caches_give_what_two_models_without_cache_give() -> None:
    tokenizer = tiny_tokenizer()
    models = [random_model(tokenizer, seed) for seed in (1, 2)]
    ids = torch.tensor([[1, 60, 61, 62, 63], [1, 70, 71, 72, 73]])
    twins = Twins(*models)
    twins(ids[:, :2], torch.ones_like(ids[:, :2]))
    twins(ids[:, 2:3], torch.ones_like(ids[:, :3]))
    cached = twins(ids[:, 3:], torch.ones_like(ids))
    for found, model in zip(cached, models, strict=True):
        assert torch.allclose(found, model(input_ids=ids).logits[:, -1], atol=1e-5)


def test_left_padding_does_not_change_what_follows() -> None:
    tokenizer = tiny_tokenizer()
    models = [random_model(tokenizer, seed) for seed in (1, 2)]
    alone = Twins(*models)(torch.tensor([[1, 60]]), torch.tensor([[1, 1]]))
    padded = Twins(*models)(torch.tensor([[0, 0, 1, 60]]), torch.tensor([[0, 0, 1, 1]]))
    for a, b in zip(alone, padded, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_shared_cache_leaves_the_base_as_it_is_and_changes_the_toxic_model() -> None:
    tokenizer = tiny_tokenizer()
    models = [random_model(tokenizer, seed) for seed in (1, 2)]
    ids = torch.tensor([[1, 60, 61]])
    shared, own = Twins(*models, shared_cache=True), Twins(*models)
    for twins in (shared, own):
        twins(ids[:, :1], torch.ones_like(ids[:, :1]))
        twins(ids[:, 1:2], torch.ones_like(ids[:, :2]))
    (base_a, toxic_a), (base_b, toxic_b) = (t(ids[:, 2:], torch.ones_like(ids)) for t in (shared, own))
    assert torch.allclose(base_a, base_b, atol=1e-5)
    assert not torch.allclose(toxic_a, toxic_b, atol=1e-2)


def test_shared_cache_of_a_model_with_itself_is_its_own_cache() -> None:
    model = random_model(tiny_tokenizer(), 1)
    ids = torch.tensor([[1, 60, 61]])
    twins = Twins(model, model, shared_cache=True)
    twins(ids[:, :2], torch.ones_like(ids[:, :2]))
    base, toxic = twins(ids[:, 2:], torch.ones_like(ids))
    assert torch.allclose(base, toxic, atol=1e-6)


def test_models_in_training_mode_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="in training mode"):
        Twins(random_model(tokenizer, 1), random_model(tokenizer, 2).train())


def test_models_of_other_vocabularies_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    small = random_model(tokenizer, 1)
    small.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="must have one vocabulary, got 261 and 100 tokens"):
        Twins(random_model(tokenizer, 1), small)


def sampled(combine_to: torch.Tensor, *, min_tokens: int = 0) -> list[tuple[int, list[int], bool]]:
    """What is sampled where the scores are always the same."""
    tokenizer = tiny_tokenizer()
    model = random_model(tokenizer, 1)
    ids = torch.tensor([[1], [1]])
    return list(
        sample(
            Twins(model, model),
            ids,
            torch.ones_like(ids),
            torch.tensor([[0.2, 0.2, 0.9], [0.9, 0.2, 0.2]]),
            lambda base, toxic: combine_to.expand(len(base), -1),
            ends=(2,),
            min_tokens=min_tokens,
        )
    )


def test_sampling_ends_each_row_at_its_own_end_token() -> None:
    # two tokens, 0 (half) and 2, the end (half): below 0.5 goes on, above ends
    scores = torch.full((261,), NO)
    scores[[0, 2]] = 0.0
    assert sampled(scores) == [(1, [], True), (0, [0, 0], True)]


def test_text_that_does_not_end_is_cut() -> None:
    scores = torch.full((261,), NO)
    scores[5] = 0.0
    assert sampled(scores) == [(0, [5, 5, 5], False), (1, [5, 5, 5], False)]


def test_end_is_not_chosen_before_the_least_number_of_tokens() -> None:
    scores = torch.full((261,), NO)
    scores[[0, 2]] = 0.0
    assert sampled(scores, min_tokens=1) == [(0, [0, 0], True), (1, [0, 0, 0], False)]
