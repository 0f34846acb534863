from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
import torch

from safeguard import Guard, Policy
from safeguard.demo import texts
from safeguard.demo.results import Prompt, Result
from safeguard.policy import InputRules, OutputRules, Rules
from safeguard.testing import FailingCheck, WordCheck
from safeguard.types import Action
from tests.adapters.tiny_lm import tiny_llama, tiny_tokenizer

POLICY = Policy(
    input=InputRules(llm=Rules(action=Action.BLOCK)), output=OutputRules(text=Rules(action=Action.BLOCK))
)


def shouter(tokenizer: Any) -> Any:
    """A model that says nothing but the first token of the vocabulary, an exclamation mark."""
    model = tiny_llama(tokenizer)
    torch.nn.init.zeros_(model.lm_head.weight)
    return model


def asked(*prompts: str, template: bool = True, **checks: Any) -> list[Result]:
    tokenizer = tiny_tokenizer() if template else tiny_tokenizer(None)
    guard = Guard(policy=POLICY, **checks)
    found = texts.ask(
        shouter(tokenizer), tokenizer, guard, [Prompt(text, False) for text in prompts], max_new_tokens=3
    )
    return list(found)


def test_a_harmless_prompt_is_answered() -> None:
    (found,) = asked("hello?", inputs=[WordCheck("bomb")])

    assert (found.answer, found.report.action) == ("!!!", Action.ALLOW)


def test_a_flagged_prompt_has_no_answer() -> None:
    first, second = asked("a bomb?", "hello?", inputs=[WordCheck("bomb")])

    assert (first.answer, first.report.action) == (None, Action.BLOCK)
    assert second.answer == "!!!"


def test_a_flagged_answer_is_withheld() -> None:
    (found,) = asked("hello?", outputs=[WordCheck("!!")])

    assert (found.answer, found.report.action) == (None, Action.BLOCK)


def test_what_cannot_be_judged_is_withheld() -> None:
    failing = FailingCheck(when=lambda text: "hello" in text)

    (found,) = asked("hello?", inputs=[failing])

    assert found.answer is None
    assert found.report.failed


def test_a_model_without_chat_template_gets_the_prompt_as_it_is() -> None:
    (found,) = asked("hello?", template=False, inputs=[WordCheck("bomb")])

    assert found.answer == "!!!"


def test_times_are_told_apart() -> None:
    (found,) = asked("hello?", inputs=[WordCheck("bomb")])

    assert found.report.latency_ms > 0
    assert found.generation_ms > 0


def test_a_folder_is_loaded_in_place_of_the_embedded_model(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tiny_llama(tokenizer).save_pretrained(tmp_path)

    model, loaded = texts.load(str(tmp_path))

    assert type(model).__name__ == "LlamaForCausalLM"
    assert len(loaded) == len(tokenizer)


def test_the_threads_of_torch_are_put_back() -> None:
    before = torch.get_num_threads()

    with texts.half_of_the_cores():
        during = torch.get_num_threads()

    assert 1 <= during <= before == torch.get_num_threads()
