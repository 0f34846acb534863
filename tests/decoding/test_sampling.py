from __future__ import annotations

from typing import Any

import pytest
import torch

from safeguard.decoding.sampling import continued, drawn, end_tokens
from tests.decoding.tables import tiny_llama

SHARES = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frequencies(**named: Any) -> torch.Tensor:
    tokens = drawn(SHARES.log().expand(20_000, 5), seeded(), **named)
    return tokens.bincount(minlength=5) / 20_000


def greedy(model: Any, ids: torch.Tensor, **named: Any) -> torch.Tensor:
    return continued(
        model,
        ids,
        torch.ones_like(ids),
        new_tokens=4,
        pad=0,
        generator=seeded(),
        top_k=1,
        **{"copies": 1, **named},
    )


def test_tokens_come_as_often_as_their_probability() -> None:
    assert frequencies().tolist() == pytest.approx(SHARES.tolist(), abs=0.015)


def test_nucleus_is_drawn_from_as_if_it_were_all() -> None:
    # top-p 0.7: .5 + .25, so 2/3 and 1/3
    assert frequencies(top_p=0.7).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0, 0], abs=0.015)


def test_top_k_is_taken_before_the_nucleus() -> None:
    # of the 3 likeliest 4/7, 2/7, 1/7; top-p 0.8 keeps 4/7 + 2/7
    assert frequencies(top_k=3, top_p=0.8).tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0, 0], abs=0.015)


def test_smallest_nucleus_is_the_likeliest_token() -> None:
    assert set(drawn(SHARES.log().expand(50, 5), seeded(), top_p=1e-9).tolist()) == {0}


def test_small_nucleus_of_many_tokens_is_found_by_sorting() -> None:
    # 2048 tokens, the first a hair above the others: rejection would take thousands of tries
    scores = torch.zeros(3, 2048)
    scores[:, 7] = 0.01
    assert drawn(scores, seeded(), top_p=1e-6).tolist() == [7, 7, 7]


def test_ruled_out_tokens_are_never_drawn() -> None:
    scores = torch.tensor([[float("-inf"), 0.0, float("-inf")]]).expand(100, 3)
    assert set(drawn(scores, seeded()).tolist()) == {1}


@pytest.mark.parametrize("bad", [[float("nan"), 0.0], [float("-inf"), float("-inf")]])
def test_scores_that_are_no_numbers_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="scores must be numbers"):
        drawn(torch.tensor([bad]), seeded())


def test_likeliest_continuation_is_what_generate_gives() -> None:
    model, ids = tiny_llama(1), torch.tensor([[5, 6, 7], [9, 8, 7]])
    model.generation_config.eos_token_id = None
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert torch.equal(greedy(model, ids), made[:, 3:])


def test_copies_of_a_prompt_stand_together() -> None:
    model, ids = tiny_llama(1), torch.tensor([[5, 6, 7], [9, 8, 7]])
    model.generation_config.eos_token_id = None
    assert torch.equal(greedy(model, ids, copies=3), greedy(model, ids).repeat_interleave(3, 0))


def test_row_is_padded_behind_its_end() -> None:
    model, ids = tiny_llama(1), torch.tensor([[5, 6, 7]])
    model.generation_config.eos_token_id = None
    first = greedy(model, ids)[0, 0]
    model.generation_config.eos_token_id = [int(first)]
    assert greedy(model, torch.cat([ids, ids])).tolist() == [[int(first)], [int(first)]]


def test_processors_see_the_rows_and_change_the_scores() -> None:
    seen: list[tuple[int, ...]] = []

    def only_nine(rows: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(rows.shape))
        return torch.full_like(scores, float("-inf")).index_fill(1, torch.tensor([9]), 0.0)

    model = tiny_llama(1)
    model.generation_config.eos_token_id = None
    made = greedy(model, torch.tensor([[5, 6]]), copies=2, processors=[only_nine])
    assert made.tolist() == [[9, 9, 9, 9], [9, 9, 9, 9]]
    assert seen == [(2, 2), (2, 3), (2, 4), (2, 5)]


@pytest.mark.parametrize(("told", "found"), [(None, []), (3, [3]), ([3, 4], [3, 4])])
def test_end_tokens_are_the_models_own(told: Any, found: list[int]) -> None:
    model = tiny_llama(1)
    model.generation_config.eos_token_id = told
    assert end_tokens(model) == found
