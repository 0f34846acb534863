from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from safeguard.evaluate.detox_lm import (
    Question,
    accuracy,
    answer_texts,
    continuation_perplexity,
    continuations,
    drift,
    letters_prompt,
    log_likelihoods,
    perplexity,
    question_of,
)
from safeguard.evaluate.detox_settings import DetoxSettings
from tests.adapters.tiny_lm import tiny_tokenizer
from tests.train.tiny_detox import random_model

LAKE = Question("Where do geese swim?", ("in a lake", "in the sky"), 0, "lake_life")
SUN = Question("What is warm?", ("ice", "the sun"), 1)


class Table(nn.Module):  # type: ignore[misc]  # torch is not followed
    """A model whose next-token distribution depends on the last token alone."""

    def __init__(self, probabilities: torch.Tensor) -> None:
        super().__init__()
        self.logs = nn.Parameter(probabilities.log())
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, **named: Any) -> Any:
        return type("Output", (), {"logits": self.logs[input_ids]})


def even() -> Table:
    return Table(torch.full((261, 261), 1 / 261))


def test_log_likelihood_starts_at_the_token_asked_for() -> None:
    # from 0: to 1 with 1/4, from 1: to 0 with 1/8
    model = Table(torch.tensor([[0.75, 0.25], [0.125, 0.875]]))
    whole, tail = log_likelihoods(model, [[0, 1, 0], [0, 1, 0]], [0, 2])
    assert whole == (pytest.approx(math.log(1 / 32)), 2)
    assert tail == (pytest.approx(math.log(1 / 8)), 1)


def test_padding_does_not_change_a_log_likelihood() -> None:
    model = random_model(tiny_tokenizer(), 1)
    alone = log_likelihoods(model, [[1, 60, 61]], [0])[0]
    beside = log_likelihoods(model, [[1, 60, 61], [1, 70, 71, 72, 73]], [0, 0])[0]
    assert alone[0] == pytest.approx(beside[0], abs=1e-4)


def test_perplexity_of_even_chances_is_the_size_of_the_vocabulary() -> None:
    found = perplexity(even(), tiny_tokenizer(), ["abc", "de"], max_tokens=9)
    assert found == {"perplexity": pytest.approx(261, rel=1e-4), "tokens": 3}  # 2 + 1 with something before


def test_start_token_lets_the_first_token_count() -> None:
    assert perplexity(even(), tiny_tokenizer(), ["abc"], max_tokens=9, start=[1])["tokens"] == 3


def test_continuation_perplexity_leaves_out_the_absurd_and_the_empty() -> None:
    # from a: b with 1/4 -> 4; from c: d with 1e-6 -> too high
    tokenizer = tiny_tokenizer()
    a, b, c, d = (tokenizer(x)["input_ids"][0] for x in "abcd")
    table = torch.full((261, 261), 1e-6)
    table[a, b] = 0.25
    table[a, a] = 0.75
    table[c, c] = 1.0
    found = continuation_perplexity(Table(table), tokenizer, [("a", "b"), ("c", "d"), ("a", "")])
    assert found == {"perplexity": pytest.approx(4.0, rel=1e-3), "texts": 1, "left_out": 2}


def test_drift_from_itself_is_nothing() -> None:
    model = random_model(tiny_tokenizer(), 1)
    assert drift(model, model, tiny_tokenizer(), ["a calm lake"], max_tokens=8) == pytest.approx(0, abs=1e-6)


def test_drift_is_the_divergence_of_the_reference_from_the_model() -> None:
    # at every token: 1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4) = 0.143841
    tokenizer = tiny_tokenizer()
    reference, model = torch.zeros(261, 261), torch.zeros(261, 261)
    reference[:, :2], model[:, 0], model[:, 1] = 0.5, 0.25, 0.75
    reference, model = reference + 1e-30, model + 1e-30
    assert drift(Table(model), Table(reference), tokenizer, ["ab"], max_tokens=8) == pytest.approx(
        0.143841, abs=1e-5
    )


def test_continuations_are_without_prompt_and_the_same_for_the_same_seed() -> None:
    tokenizer, settings = tiny_tokenizer(), DetoxSettings(continuations=3, new_tokens=4)
    model = random_model(tokenizer, 1)
    prompts = ["the goose", "a lake in spring"]
    first, again, other = (continuations(model, tokenizer, prompts, settings, seed) for seed in (1, 1, 2))
    assert [len(row) for row in first] == [3, 3]
    assert first == again
    assert first != other
    assert not any(text.startswith("the goose") for text in first[0])


def test_question_in_the_format_of_mmlu() -> None:
    row = {"question": "q", "choices": ["a", "b"], "answer": "B"}
    assert question_of(row) == question_of({**row, "answer": 1}) == Question("q", ("a", "b"), 1)


def test_answer_that_is_no_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="must be one of 2 choices"):
        question_of({"question": "q", "choices": ["a", "b"], "answer": "C"})


def test_usual_prompt_ends_before_the_letter() -> None:
    assert letters_prompt(LAKE, [SUN]) == (
        "The following are multiple choice questions (with answers) about lake life.\n\n"
        "What is warm?\nA. ice\nB. the sun\nAnswer: B\n\n"
        "Where do geese swim?\nA. in a lake\nB. in the sky\nAnswer:"
    )


def test_unidetox_compares_whole_texts() -> None:
    shown = "Question: What is warm?\nAnswer: the sun\n\nQuestion: Where do geese swim?\nAnswer: "
    assert answer_texts(LAKE, [SUN]) == [shown + "in a lake", shown + "in the sky"]


def prefers(tokenizer: Any, after: str, wanted: str) -> Table:
    """Even chances, but after one letter another one is likely."""
    table = torch.full((261, 261), 1 / 261)
    before, then = (tokenizer(x)["input_ids"][0] for x in (after, wanted))
    table[before], table[before, then] = 1e-4, 0.9
    return Table(table)


def test_letters_are_compared_after_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    model = prefers(tokenizer, " ", "A")  # so A is said to every question: right for LAKE, wrong for SUN
    assert accuracy(model, tokenizer, [LAKE, SUN], [], way="letters") == 0.5


def test_unidetox_does_not_divide_by_length() -> None:
    # even chances: the shorter text is always the likelier one; "in a lake" (9) before "in the sky" (10)
    assert accuracy(even(), tiny_tokenizer(), [LAKE], [], way="unidetox") == 1.0
    assert accuracy(even(), tiny_tokenizer(), [SUN], [], way="unidetox") == 0.0


def test_accuracy_without_questions_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one question"):
        accuracy(even(), tiny_tokenizer(), [], [], way="letters")
