"""Ways around a guarded language model, each of which is closed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from safeguard import Blocked, CheckFailed, Guard, Policy, UnseenInput
from safeguard.testing import FailingCheck, WordCheck
from tests.adapters.tiny_lm import Script, asked, tiny_llama, tiny_tokenizer

TOK = tiny_tokenizer()


def guarded(*, inputs: Any = None, outputs: Any = None, **policy: Any) -> Any:
    checks = (inputs or [WordCheck("knife")], outputs or [WordCheck("blood")])
    return Guard(*checks, policy=Policy(**policy))(tiny_llama(TOK), tokenizer=TOK)


def generate(model: Any, answers: Any = None, **how: Any) -> Any:
    how = {"max_new_tokens": 40, "do_sample": False, "logits_processor": [Script(TOK, answers or {})]} | how
    return model.generate(**how)


def test_prompt_given_as_inputs_is_seen() -> None:
    with pytest.raises(Blocked):
        generate(guarded(), inputs=asked(TOK, "a knife?")["input_ids"])


def test_prompt_given_by_position_is_seen() -> None:
    with pytest.raises(Blocked):
        guarded().generate(asked(TOK, "a knife?")["input_ids"], max_new_tokens=2)


def test_prompt_behind_long_padding_is_seen() -> None:
    with pytest.raises(Blocked):
        generate(guarded(), **asked(TOK, "a knife?", "x" * 500 + "?"))


def test_masked_words_are_judged_because_some_models_see_them() -> None:
    batch = asked(TOK, "a knife and?")
    batch["attention_mask"][0, :7] = 0
    with pytest.raises(Blocked):
        generate(guarded(), **batch)


def test_masked_padding_that_is_no_special_token_is_left_out() -> None:
    check = WordCheck("knife")
    batch = asked(TOK, "!!!!hello?")
    batch["attention_mask"][0, :4] = 0
    generate(guarded(inputs=[check]), **batch)
    assert check.seen
    assert not any("!" in text for text in check.seen)


def test_masked_word_of_one_token_is_no_padding() -> None:
    check = WordCheck("aa?")
    batch = asked(TOK, "aa?")  # a byte each: the two letters are one repeated token
    batch["attention_mask"][0, :2] = 0
    with pytest.raises(Blocked):
        generate(guarded(inputs=[check]), **batch)


def test_word_cut_by_control_tokens_is_seen() -> None:
    with pytest.raises(Blocked):
        generate(guarded(), **asked(TOK, "a kn<pad>ife?"))


def test_word_with_zero_width_letters_is_seen() -> None:
    with pytest.raises(Blocked):
        generate(guarded(), **asked(TOK, "a kn\u200bi\u200bfe?"))


def test_unsafe_neighbour_changes_nothing_for_a_row() -> None:
    with pytest.raises(Blocked) as caught:
        generate(guarded(), **asked(TOK, "hello?", "a knife?", "bye?"))
    texts = TOK.batch_decode(caught.value.output, skip_special_tokens=True)
    assert texts == ["hello?fine", "a knife?", "bye?fine"]
    assert [r.blocked for r in caught.value.reports] == [False, True, False]


def test_embeddings_are_refused_as_unseen() -> None:
    model = guarded()
    embeds = model.get_input_embeddings()(asked(TOK, "a knife?")["input_ids"])
    with pytest.raises(UnseenInput, match="inputs_embeds cannot be seen by any check"):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)


def test_embeddings_beside_harmless_tokens_are_refused() -> None:
    model = guarded()
    batch = asked(TOK, "hello?")
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(UnseenInput):
        model.generate(**batch, inputs_embeds=embeds, max_new_tokens=2)


def test_allowed_embeddings_still_have_their_output_judged() -> None:
    model = guarded(unseen_input="allow", outputs=[FailingCheck()])
    embeds = model.get_input_embeddings()(asked(TOK, "hello?")["input_ids"])
    with pytest.raises(CheckFailed):
        model.generate(inputs_embeds=embeds, max_new_tokens=2)


def test_pictures_are_refused_as_unseen() -> None:
    with pytest.raises(UnseenInput, match="pixel_values cannot be seen"):
        generate(guarded(), **asked(TOK, "hello?"), pixel_values=torch.zeros(1, 3, 4, 4))


def test_cache_that_holds_another_prompt_is_refused() -> None:
    model = guarded()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**asked(TOK, "a knife"), past_key_values=cache)
    with pytest.raises(UnseenInput, match="past_key_values"):
        generate(model, **asked(TOK, "spoons. what?"), past_key_values=cache)


def test_empty_cache_is_no_prompt() -> None:
    model = guarded()
    output = generate(model, **asked(TOK, "hello?"), past_key_values=DynamicCache(config=model.config))
    assert TOK.batch_decode(output, skip_special_tokens=True) == ["hello?fine"]


def test_negative_prompt_tokens_are_judged() -> None:
    negative = TOK("a knife", return_tensors="pt")["input_ids"]
    with pytest.raises(Blocked):
        generate(guarded(), **asked(TOK, "hello?"), negative_prompt_ids=negative)


def test_token_unknown_to_the_tokenizer_is_unseen() -> None:
    batch = asked(TOK, "hello?")
    batch["input_ids"][0, 0] = 5000
    with pytest.raises(UnseenInput, match="token that the tokenizer does not know"):
        generate(guarded(), **batch)


def test_custom_generate_that_leaves_out_the_prompt_is_judged_whole() -> None:
    def only_new(model: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return TOK("blood", return_tensors="pt")["input_ids"]

    # 5 tokens of answer are fewer than the 8 of the prompt: cut off by length nothing would be left to judge
    with pytest.raises(Blocked):
        generate(guarded(), **asked(TOK, "a story?"), custom_generate=only_new)


def test_custom_generate_that_returns_no_tokens_is_an_error() -> None:
    with pytest.raises(TypeError, match="must give tokens that can be judged, got list"):
        generate(
            guarded(), **asked(TOK, "hello?"), custom_generate=lambda model, input_ids, **kwargs: ["text"]
        )


def test_check_that_fails_on_one_row_withholds_that_row() -> None:
    model = guarded(outputs=[FailingCheck(when=lambda text: "two" in text)], on_block="replace")
    output = generate(model, {"b?": "two", "a?": "one"}, **asked(TOK, "a?", "b?"))
    assert TOK.batch_decode(output, skip_special_tokens=True) == ["a?one", "b?"]


def test_neither_prompt_nor_answer_is_in_the_exception() -> None:
    with pytest.raises(Blocked) as caught:
        generate(guarded(), {"canary": "canary blood"}, **asked(TOK, "canary?"))
    assert "canary" not in str(caught.value)
    assert "canary" not in repr(caught.value.reports)


@pytest.mark.parametrize("scale", [0.0, -2.0, 0.5])
def test_negative_prompt_that_draws_the_model_is_judged_where_others_are_only_reported(scale: float) -> None:
    model, negative = guarded(negative_prompt="report"), asked(TOK, "a knife?")["input_ids"]
    with pytest.raises(Blocked):
        generate(model, **asked(TOK, "hello?"), negative_prompt_ids=negative, guidance_scale=scale)
    generate(model, **asked(TOK, "hello?"), negative_prompt_ids=negative, guidance_scale=1.5)
