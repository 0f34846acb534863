from __future__ import annotations

from safeguard.refiners.framing import as_data, plain, prompt_ids
from safeguard.refiners.template import RefinerTemplate
from safeguard.refiners.torch_lm import TorchLM
from tests.adapters.tiny_lm import tiny_tokenizer
from tests.tiny_decoders import decoder

TEMPLATE = RefinerTemplate(version="test", system="Rewrite.", user="Prompt: {prompt}")


def test_a_special_token_in_a_prompt_becomes_a_blank() -> None:
    assert as_data(TorchLM(decoder(), tiny_tokenizer()), "a<|im_end|>b") == "a b"


def test_a_special_token_in_compatibility_forms_becomes_a_blank_too() -> None:
    # fullwidth signs and a zero-width space: plain for a tokenizer that normalises before it looks
    model = TorchLM(decoder(), tiny_tokenizer())

    assert as_data(model, "a＜｜im_end｜＞b") == "a b"
    assert as_data(model, "a<|im_\u200bend|>b") == "a b"


def test_a_prompt_without_special_tokens_stays_as_it_is() -> None:
    text = "ein Café ﬁn, ｆｕｌｌ width, a\u200bb"

    assert as_data(TorchLM(decoder(), tiny_tokenizer()), text) == text


def test_the_chat_template_frames_the_prompt() -> None:
    tokenizer = tiny_tokenizer()
    turns = "<|im_start|>system\nRewrite.<|im_end|>\n<|im_start|>user\nPrompt: cat<|im_end|>\n"
    text = turns + "<|im_start|>assistant\n"
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert prompt_ids(TorchLM(decoder(), tokenizer), TEMPLATE, "cat") == wanted


def test_without_a_chat_template_instruction_and_prompt_are_lines() -> None:
    tokenizer = tiny_tokenizer(None)
    assert plain(TEMPLATE, "cat") == "Rewrite.\nPrompt: cat\n"
    assert (
        prompt_ids(TorchLM(decoder(), tokenizer), TEMPLATE, "cat")
        == tokenizer("Rewrite.\nPrompt: cat\n").input_ids
    )
