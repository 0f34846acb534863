"""The files that transformers write, read without transformers: both must say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models

pytest.importorskip("transformers", reason="needs transformers")

from safeguard.errors import PackError
from safeguard.refiners.file_tokens import FileTokens, end_ids
from safeguard.refiners.torch_lm import TorchLM
from tests.adapters.tiny_lm import PLAIN, tiny_llama, tiny_tokenizer

TURNS = [{"role": "system", "content": "Rewrite."}, {"role": "user", "content": "a “cat” <b> 猫 & 'dog'"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def both(folder: Path) -> tuple[FileTokens, Any]:
    tokenizer = tiny_tokenizer()
    return FileTokens.load(folder), TorchLM(tiny_llama(tokenizer), tokenizer)


@pytest.mark.parametrize("text", ["", "a cat", "猫 é\u0301 \u200b 👩‍👩‍👧", "<|im_end|>\n</s>", "a\x00b"])
def test_texts_become_the_ids_that_transformers_give(both: tuple[FileTokens, Any], text: str) -> None:
    tokens, reference = both
    assert tokens.encode(text) == reference.encode(text)
    assert tokens.encode(text, framed=True) == reference.encode(text, framed=True)


def test_a_conversation_is_written_as_transformers_write_it(both: tuple[FileTokens, Any]) -> None:
    tokens, reference = both
    assert tokens.render(TURNS) == reference.render(TURNS)


def test_templates_may_name_special_tokens(tmp_path: Path) -> None:
    tiny_tokenizer(PLAIN).save_pretrained(tmp_path)
    assert FileTokens.load(tmp_path).render(TURNS[:1]) == "<s>### system: Rewrite.\n### assistant: "


def test_the_same_tokens_are_taken_out_of_prompts(both: tuple[FileTokens, Any]) -> None:
    tokens, reference = both
    assert tokens.special is not None
    assert tokens.special.pattern == reference.special.pattern


def test_special_tokens_are_not_part_of_an_answer(both: tuple[FileTokens, Any]) -> None:
    tokens, _ = both
    assert tokens.decode(tokens.encode("a cat</s>")) == "a cat"


def test_padding_and_truncation_in_the_file_do_not_apply(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.enable_truncation(1)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert FileTokens.load(tmp_path).encode("b") == [1]


def test_a_folder_without_settings_has_no_template_and_no_end(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    tokens = FileTokens.load(tmp_path)
    assert (tokens.render(TURNS), tokens.end(), end_ids(None, tokens)) == (None, None, frozenset())


@pytest.mark.parametrize(("own", "ends"), [(None, [258]), (7, [7]), ([7, 8], [7, 8])])
def test_the_end_is_the_models_own_else_the_tokenizers(folder: Path, own: Any, ends: list[int]) -> None:
    # the tokenizer's: 256 bytes, <pad>, <s>, </s>
    assert sorted(end_ids(own, FileTokens.load(folder))) == ends


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"has no tokenizer\.json; save the model's fast tokenizer beside it"):
        FileTokens.load(tmp_path)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(PackError, match=r"tokenizer\.json is no tokenizer"):
        FileTokens.load(tmp_path)


@pytest.mark.parametrize(("content", "why"), [("[]", "must hold a JSON object"), ("{", "is not valid JSON")])
def test_settings_that_say_nothing_are_refused(folder: Path, content: str, why: str) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(PackError, match=why):
        FileTokens.load(folder)


def test_a_malformed_template_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(PackError, match="the chat template is malformed"):
        FileTokens.load(folder)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system turn') }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}"]
)
def test_a_template_that_refuses_or_breaks_out_is_an_error(folder: Path, template: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(PackError, match="the chat template cannot write this conversation"):
        FileTokens.load(folder).render(TURNS)


def test_of_several_templates_the_default_one_is_taken(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "{{ messages | tojson }}"},
    ]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    turns = [{"role": "user", "content": "猫"}]
    assert FileTokens.load(folder).render(turns) == '[{"role": "user", "content": "猫"}]'
