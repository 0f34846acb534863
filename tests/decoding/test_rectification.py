from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from safeguard.decoding.rectification import RectificationProcessor, rectified
from safeguard.errors import CheckFailed
from tests.decoding.tables import TableModel, prompts, tiny_llama

IDS = torch.tensor([[0, 1]])
BASE = torch.tensor([[0.5, 0.25, 0.125, 0.1, 0.025]]).log()


def values(*q: float) -> TableModel:
    """A value model that says the same after token 1."""
    return TableModel([[0.0] * len(q), list(q)])


def test_one_pass_cuts_to_the_cap_and_shares_out_the_rest() -> None:
    # cap of the first: 1 - 0.8 - 0.1 = 0.1; left: .1 + .25 + .125 + .1 + .025 = .6
    got = rectified(BASE, torch.tensor([[-0.8, 0.0, 0.0, 0.0, 0.0]]), 0.1, passes=1).exp()
    assert got[0].tolist() == pytest.approx([0.1 / 0.6, 0.25 / 0.6, 0.125 / 0.6, 0.1 / 0.6, 0.025 / 0.6])


def test_the_second_pass_cuts_what_the_first_made_larger() -> None:
    # after the first pass the mass is .6, so the cap is .06 of it; left: .06 + .5 = .56
    got = rectified(BASE, torch.tensor([[-0.8, 0.0, 0.0, 0.0, 0.0]]), 0.1, passes=2).exp()
    assert got[0, 0].item() == pytest.approx(0.06 / 0.56)


def test_epsilon_alone_caps_a_certain_token() -> None:
    # cap .7 of .9, then of .8 = .56: left .56 + .1
    got = rectified(torch.tensor([[0.9, 0.1]]).log(), torch.zeros(1, 2), 0.3).exp()
    assert got[0].tolist() == pytest.approx([0.56 / 0.66, 0.1 / 0.66])


def test_values_of_zero_change_nothing_below_the_cap() -> None:
    assert torch.allclose(rectified(BASE, torch.zeros_like(BASE), 0.1), BASE, atol=1e-6)


def test_certain_harm_is_capped_at_the_least() -> None:
    got = rectified(BASE, torch.tensor([[-1.0, 0.0, 0.0, 0.0, 0.0]]), 0.1, passes=1).exp()
    assert got[0, 0].item() == pytest.approx(1e-7 / 0.5000001, rel=1e-3)


def test_tokens_behind_the_k_likeliest_get_nothing() -> None:
    # the third, fourth and fifth go before anything is capped: odds .5 to .25 become cap .1 of .75 to .25
    got = RectificationProcessor(values(-0.8, 0.0, 0.0, 0.0, 0.0), top_k=2, passes=1)(IDS, BASE).exp()
    assert got[0].tolist() == pytest.approx([0.075 / 0.325, 0.25 / 0.325, 0.0, 0.0, 0.0])


def test_values_out_of_range_let_nothing_through() -> None:
    with pytest.raises(CheckFailed, match=r"values outside \[-1, 0\]"):
        RectificationProcessor(values(0.1, 0.0, 0.0, 0.0, 0.0))(IDS, BASE)


def test_values_that_are_no_numbers_let_nothing_through() -> None:
    with pytest.raises(CheckFailed, match="scores of the value model that are not finite"):
        RectificationProcessor(values(math.nan, 0.0, 0.0, 0.0, 0.0))(IDS, BASE)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"epsilon": 1.0}, r"epsilon must be in \[0, 1\), got 1.0"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"passes": 0}, "passes must be 1 or more, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RectificationProcessor(values(0.0), **settings)


@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"do_sample": True}, {"num_beams": 3, "do_sample": False}]
)
def test_cached_and_uncached_generation_agree(how: dict[str, Any], value_model: Any) -> None:
    model, batch = tiny_llama(0), prompts("batch")

    def made(use_cache: bool) -> torch.Tensor:
        processor = RectificationProcessor(
            value_model, epsilon=0.2, attention_mask=batch["attention_mask"], use_cache=use_cache
        )
        torch.manual_seed(3)
        ids: torch.Tensor = model.generate(**batch, max_new_tokens=10, logits_processor=[processor], **how)
        return ids

    assert torch.equal(made(True), made(False))
