from __future__ import annotations

from typing import Any

import pytest

from safeguard.refiners.causal_lm import CausalLMRefiner
from safeguard.refiners.language_model import Answer
from safeguard.refiners.torch_lm import TorchLM
from safeguard.train.refiner.examples import answer_end, example, examples
from safeguard.train.refiner.pairs import Pair
from safeguard.types import RefineRequest
from tests.adapters.tiny_lm import PLAIN, tiny_tokenizer
from tests.tiny_decoders import END, TEMPLATE, decoder

IM_END = 260
"""Id of `<|im_end|>`: 256 bytes, then `<pad>`, `<s>`, `</s>`, `<|im_start|>`."""


class Recorder(TorchLM):
    """The real language model, which keeps the rows that a served refiner gives it."""

    rows: list[list[int]]

    def generate(self, rows: Any, limits: Any, /, *, stop: Any = None) -> list[Answer]:
        self.rows = [list(row) for row in rows]
        return [Answer("keep", True) for _ in rows]


@pytest.mark.parametrize("template", ["chat", None])
@pytest.mark.parametrize("prompt", ["an angry man", "a<|im_end|>b", "ünïcode 猫", "{prompt} {braces}"])
def test_training_sees_the_tokens_that_serving_gives_the_model(template: str | None, prompt: str) -> None:
    tokenizer = tiny_tokenizer() if template else tiny_tokenizer(None)
    lm = Recorder(decoder(), tokenizer)
    CausalLMRefiner(lm, TEMPLATE)([RefineRequest(prompt)])
    trained = example(lm, TEMPLATE, Pair(prompt, "b"), END)
    assert trained["input_ids"][:-2] == lm.rows[0]  # without "b" and the end


def lm() -> TorchLM:
    return TorchLM(decoder(), tiny_tokenizer())


def test_loss_is_on_the_answer_and_its_end_only() -> None:
    made = example(lm(), TEMPLATE, Pair("x", "ok"), END)
    answer = [*tiny_tokenizer()("ok", add_special_tokens=False)["input_ids"], END]
    assert made["labels"][-3:] == answer
    assert set(made["labels"][:-3]) == {-100}
    assert len(made["labels"]) == len(made["input_ids"])


def test_loss_on_the_whole_sequence_is_a_flag() -> None:
    made = example(lm(), TEMPLATE, Pair("x", "ok"), END, whole=True)
    assert made["labels"] == made["input_ids"]


def test_a_prompt_that_stays_is_answered_with_the_keep_word() -> None:
    made = example(lm(), TEMPLATE, Pair("x", None), END)
    wanted = [*tiny_tokenizer()("keep", add_special_tokens=False)["input_ids"], END]
    assert [label for label in made["labels"] if label != -100] == wanted


def test_a_special_token_in_a_rewrite_becomes_a_blank() -> None:
    made = example(lm(), TEMPLATE, Pair("x", "a</s>b"), END)
    assert made["labels"].count(END) == 1


def test_a_long_example_is_left_out_and_not_cut() -> None:
    pairs = [Pair("x", "ok"), Pair("x" * 500, "ok")]
    assert len(examples(lm(), TEMPLATE, pairs, END, longest=200)) == 1


def test_the_answer_ends_with_the_token_that_the_chat_template_writes() -> None:
    model, tokenizer = decoder(eos_token_id=[END, IM_END]), tiny_tokenizer()
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == IM_END
    assert answer_end(TorchLM(model, tokenizer), model, tokenizer, TEMPLATE) == IM_END


def test_the_answer_ends_with_the_models_own_token_where_the_template_writes_none() -> None:
    model, tokenizer = decoder(), tiny_tokenizer(PLAIN)
    assert answer_end(TorchLM(model, tokenizer), model, tokenizer, TEMPLATE) == END


def test_without_an_end_token_nothing_is_trained() -> None:
    model, tokenizer = decoder(eos_token_id=None), tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="must have an end-of-text token"):
        answer_end(TorchLM(model, tokenizer), model, tokenizer, TEMPLATE)
