"""A tokenizer and its chat template out of the files beside a model, as transformers apply them."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from tokenizers import Tokenizer

from safeguard.errors import MissingExtra, PackError
from safeguard.refiners.language_model import Turns, special_pattern

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class FileTokens:
    """Encodes, decodes and renders conversations. Safe to call from several threads."""

    def __init__(
        self, tokenizer: Tokenizer, template: str | None = None, named: Mapping[str, str] | None = None
    ) -> None:
        tokenizer.no_truncation()  # a file may ask for both, and each changes every text
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._named = dict(named or {})
        self._template = _compile(template) if template else None
        added = tokenizer.get_added_tokens_decoder().values()
        self.special: re.Pattern[str] | None = special_pattern(
            ((str(token.content), bool(token.special)) for token in added), self._named.values()
        )

    @classmethod
    def load(cls, folder: Path) -> FileTokens:
        """From `tokenizer.json`, `tokenizer_config.json` and, where there is one, `chat_template.jinja`.

        Raises PackError when the first is missing or one of them is malformed, MissingExtra for a chat
        template without jinja2.
        """
        path = folder / TOKENIZER
        if not path.is_file():
            raise PackError(f"{folder} has no {TOKENIZER}; save the model's fast tokenizer beside it")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as exc:  # tokenizers raises bare Exceptions
            raise PackError(f"{path.name} is no tokenizer: {exc}") from exc
        settings = _read(folder / SETTINGS)
        named = {name: _content(settings[name]) for name in _NAMED if settings.get(name)}
        template = settings.get("chat_template")
        if (folder / TEMPLATE).is_file():
            template = (folder / TEMPLATE).read_text(encoding="utf-8")
        if isinstance(template, list):  # several, by name
            template = {str(t["name"]): str(t["template"]) for t in template}.get("default")
        return cls(tokenizer, template, named)

    @property
    def vocabulary(self) -> int:
        """Ids that the tokenizer can give, from 0."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def end(self) -> int | None:
        """The id of the end of a text, where the settings name one."""
        token = self._named.get("eos_token")
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str, /, *, framed: bool = False) -> list[int]:
        """Token ids; framed: with the special tokens that the tokenizer sets around a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=framed).ids)

    def decode(self, ids: Sequence[int], /) -> str:
        """The text of ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def render(self, turns: Turns, /) -> str | None:
        """The conversation up to where the model answers; None without a chat template.

        Raises PackError for a template that refuses the conversation.
        """
        if self._template is None:
            return None
        try:
            return str(
                self._template.render(
                    messages=[dict(turn) for turn in turns], add_generation_prompt=True, **self._named
                )
            )
        except Exception as exc:  # whatever a template does wrong
            raise PackError(f"the chat template cannot write this conversation: {exc}") from exc


def end_ids(found: int | Collection[int] | None, tokens: FileTokens) -> frozenset[int]:
    """Ids that end an answer: those of the model, else the tokenizer's end of text, else none."""
    if found is None:
        end = tokens.end()
        return frozenset() if end is None else frozenset({end})
    return frozenset({found} if isinstance(found, int) else found)


def _compile(template: str) -> Any:
    """In the same sandbox as transformers, with the names that its templates use."""
    try:
        from jinja2.exceptions import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as exc:
        raise MissingExtra("jinja2", extra="genai") from exc

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except TemplateError as exc:
        raise PackError(f"the chat template is malformed: {exc}") from exc


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise PackError(f"{path.name} is not valid JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise PackError(f"{path.name} must hold a JSON object, got {type(data).__name__}")
    return data


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)
