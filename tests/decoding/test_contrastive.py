from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from safeguard.decoding.contrastive import ContrastiveProcessor, contrasted, nucleus, plausible
from safeguard.errors import CheckFailed
from tests.decoding.tables import TableModel, prompts, tiny_gpt2, tiny_llama

LN2, LN3 = math.log(2), math.log(3)
IDS = torch.tensor([[0, 1]])
BASE = torch.tensor([[0.5, 0.25, 0.125, 0.1, 0.025]]).log()  # five tokens, by their probabilities
INF = math.inf


def anti(*logits: float) -> TableModel:
    """A model that says the same after token 1."""
    return TableModel([[0.0] * len(logits), list(logits)])


def test_pure_difference_among_the_plausible_is_the_papers_formula() -> None:
    # plausible at 0.2 x 0.5 = 0.1: the first four. base - anti: anti says 2, 1, 1/2, 1 (as odds)
    # .5/2 = .25, .25/1 = .25, .125/.5 = .25, .1/1 = .1: together .85
    model = anti(LN2, 0.0, -LN2, 0.0, -5.0)
    got = ContrastiveProcessor(model, strength=INF, plausibility=0.2 - 1e-6)(IDS, BASE).exp()
    assert got[0].tolist() == pytest.approx([0.25 / 0.85, 0.25 / 0.85, 0.25 / 0.85, 0.1 / 0.85, 0.0])


def test_general_form_is_base_twice_less_anti_once_at_strength_one() -> None:
    # (1 + 1) base - anti: .25/2, .0625/1, .015625/.5, .01, .000625: times 1600: 200, 100, 50, 16, 1 = 367
    model = anti(LN2, 0.0, -LN2, 0.0, 0.0)
    got = ContrastiveProcessor(model, strength=1.0, plausibility=None)(IDS, BASE).exp()
    assert got[0].tolist() == pytest.approx([200 / 367, 100 / 367, 50 / 367, 16 / 367, 1 / 367], rel=1e-4)


def test_expert_and_anti_expert_work_within_the_nucleus_of_the_base() -> None:
    # nucleus 0.7: .5 + .25. base (expert / anti)^2: .5 (1/2)^2 = .125, .25 (3/1)^2 = 2.25: 1/19, 18/19
    got = ContrastiveProcessor(
        anti(LN2, 0.0, 0.0, 0.0, 0.0),
        anti(0.0, LN3, 9.0, 9.0, 9.0),
        strength=2.0,
        plausibility=None,
        top_p=0.7,
    )(IDS, BASE).exp()
    assert got[0].tolist() == pytest.approx([1 / 19, 18 / 19, 0.0, 0.0, 0.0])


def test_strength_zero_leaves_the_base_alone() -> None:
    got = ContrastiveProcessor(anti(5.0, 0.0, 0.0, 0.0, 0.0), strength=0.0, plausibility=None)(IDS, BASE)
    assert torch.allclose(got, BASE, atol=1e-6)


def test_a_token_that_was_banned_stays_banned() -> None:
    scores = BASE.clone()
    scores[0, 0] = -INF
    got = ContrastiveProcessor(anti(-50.0, 0.0, 0.0, 0.0, 0.0), strength=INF, plausibility=None)(IDS, scores)
    assert got[0, 0] == -INF
    assert torch.isfinite(got[0, 1:]).all()


def test_one_token_left_by_others_is_kept_however_implausible() -> None:
    scores = torch.full_like(BASE, -INF)
    scores[0, 4] = -30.0
    got = ContrastiveProcessor(anti(0.0, 0.0, 0.0, 0.0, 99.0))(IDS, scores)
    assert got.exp()[0].tolist() == [0.0, 0.0, 0.0, 0.0, 1.0]


def test_plausible_keeps_what_is_a_tenth_as_likely_as_the_best() -> None:
    assert plausible(BASE, 0.1).tolist() == [[True, True, True, True, False]]  # 0.05 and more


def test_nucleus_ends_with_the_token_that_fills_it() -> None:
    assert nucleus(BASE, 0.8).tolist() == [[True, True, True, False, False]]  # .5 + .25 + .125 = .875


def test_nucleus_always_keeps_the_likeliest() -> None:
    assert nucleus(BASE, 1e-9).tolist() == [[True, False, False, False, False]]


def test_infinite_strength_with_an_expert_leaves_the_base_out() -> None:
    got = contrasted(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0, 4.0]]), INF)
    assert got.tolist() == [[3.0, 2.0]]


def test_other_table_size_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"anti-expert has 6 tokens and the guided model 5; .* vocabulary="):
        ContrastiveProcessor(anti(*[0.0] * 6))(IDS, BASE)


def test_padded_tables_are_cut_to_the_vocabulary() -> None:
    # the sixth column of the anti-expert and the fifth of the base are padding
    wide = ContrastiveProcessor(anti(LN2, 0.0, 0.0, 0.0, 7.0, 7.0), strength=1.0, vocabulary=4)(IDS, BASE)
    four = ContrastiveProcessor(anti(LN2, 0.0, 0.0, 0.0), strength=1.0)(IDS, BASE[:, :4])
    assert torch.allclose(wide[:, :4], four)
    assert wide[0, 4] == -INF


def test_a_smaller_anti_expert_may_still_know_the_vocabulary() -> None:
    small = ContrastiveProcessor(anti(LN2, 0.0, 0.0, 0.0), strength=1.0, vocabulary=4)(IDS, BASE)
    assert small[0, 4] == -INF
    assert torch.isfinite(small[0, :2]).all()


def test_tables_smaller_than_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="anti-expert has 3 tokens, fewer than vocabulary=5"):
        ContrastiveProcessor(anti(0.0, 0.0, 0.0), vocabulary=5)(IDS, BASE)
    with pytest.raises(ValueError, match="guided model has 5 tokens, fewer than vocabulary=6"):
        ContrastiveProcessor(anti(*[0.0] * 6), vocabulary=6)(IDS, BASE)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_let_nothing_through(bad: float) -> None:
    with pytest.raises(CheckFailed, match="scores of the anti-expert that are not finite numbers"):
        ContrastiveProcessor(anti(bad, 0.0, 0.0, 0.0, 0.0))(IDS, BASE)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strength": -1.0}, "strength must be 0 or more, got -1.0"),
        ({"strength": math.nan}, "strength must be 0 or more, got nan"),
        ({"plausibility": 0.0}, r"plausibility must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ContrastiveProcessor(anti(0.0), **settings)  # type: ignore[arg-type]


HOW: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"do_sample": True, "num_beams": 3},
}


def continued(make: Any, how: dict[str, Any], batch: dict[str, torch.Tensor], **options: Any) -> Any:
    model, other, third = make(0), make(1), make(2)
    processor = ContrastiveProcessor(other, third, strength=1.0, plausibility=0.05, **options)
    torch.manual_seed(7)
    return model.generate(
        **batch, max_new_tokens=12, logits_processor=LogitsProcessorList([processor]), **how
    )


@pytest.mark.parametrize("kind", ["one", "batch"])
@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_cached_and_uncached_generation_agree(make: Any, how: dict[str, Any], kind: str) -> None:
    batch = prompts(kind)
    mask = batch["attention_mask"]
    cached = continued(make, how, batch, attention_mask=mask)
    plain = continued(make, how, batch, attention_mask=mask, use_cache=False)
    assert torch.equal(cached, plain)
    assert not torch.equal(cached, _bare(make, how, batch)[:, : cached.shape[1]])  # it does something


def _bare(make: Any, how: dict[str, Any], batch: dict[str, torch.Tensor]) -> Any:
    torch.manual_seed(7)
    return make(0).generate(**batch, max_new_tokens=12, **how)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_assisted_generation_gives_what_greedy_search_gives(make: Any) -> None:
    batch = prompts("one")
    greedy = continued(make, {"do_sample": False}, batch)
    assert torch.equal(continued(make, {"do_sample": False, "assistant_model": make(0)}, batch), greedy)
    assert torch.equal(continued(make, {"do_sample": False, "prompt_lookup_num_tokens": 3}, batch), greedy)


def test_a_padded_batch_gives_what_each_prompt_gives_alone() -> None:
    batch = prompts("batch")
    together = continued(tiny_gpt2, {"do_sample": False}, batch, attention_mask=batch["attention_mask"])
    row = batch["input_ids"][0, 2:][None]
    single = continued(tiny_gpt2, {"do_sample": False}, {"input_ids": row, "attention_mask": row * 0 + 1})
    assert together[0, 5:].tolist()[: single.shape[1] - 3] == single[0, 3:].tolist()


def test_one_processor_serves_one_call_after_another() -> None:
    model, processor = tiny_llama(0), ContrastiveProcessor(tiny_llama(1), pad_token_id=0)
    kinds = ("one", "batch", "one")
    first, _, again = (
        model.generate(**prompts(k), max_new_tokens=6, do_sample=False, logits_processor=[processor])
        for k in kinds
    )
    assert torch.equal(first, again)


def test_nucleus_wider_than_the_likeliest_thousand_is_found_whole() -> None:
    # 4000 even tokens: half of them fill top-p 0.5, more than are looked at first
    assert int(nucleus(torch.zeros(1, 4000), 0.5).sum()) in {2000, 2001}
