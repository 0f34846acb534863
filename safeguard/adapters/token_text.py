"""Tokens to the text that is judged, and text back to tokens."""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from safeguard.adapters import chat
from safeguard.adapters.chat import Part
from safeguard.errors import CheckFailed


class TokenText:
    """What a guard does with a tokenizer. Safe to use from several threads, also while others use it.

    Tokens that are added to the tokenizer later are unknown to it, and prompts that hold them are refused.
    """

    def __init__(self, tokenizer: Any) -> None:
        # fast ones raise "Already borrowed" when a thread pads while another encodes, so ours is a copy
        self._tokenizer = copy.deepcopy(tokenizer) if getattr(tokenizer, "is_fast", False) else tokenizer
        self._lock = threading.Lock()
        added = getattr(tokenizer, "added_tokens_decoder", None) or {}
        special = {*tokenizer.all_special_tokens, *(t.content for t in added.values() if t.special)} - {""}
        self.special_ids = frozenset(
            [*tokenizer.all_special_ids, *(i for i, t in added.items() if t.special)]
        )
        self._special = _any_of(special)
        self.largest = max(tokenizer.get_vocab().values(), default=-1)
        self.eos: int | None = tokenizer.eos_token_id
        self.pad: int | None = tokenizer.pad_token_id
        self.markers = chat.learn(self._render) if getattr(tokenizer, "chat_template", None) else None
        marks = () if self.markers is None else [o.strip() for o in self.markers.openings]
        self._control = _any_of({*special, *marks})

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of tokens, with or without control tokens."""
        return str(
            self._tokenizer.decode(ids, skip_special_tokens=not special, clean_up_tokenization_spaces=False)
        )

    def encode(self, text: str) -> list[int]:
        """Tokens of a text; none are put around it."""
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def plain(self, text: str) -> str:
        """The text without anything that spells a control token."""
        return text if self._special is None else self._special.sub("", text)

    def controls(self, text: str) -> bool:
        """Whether a text spells something with which the template marks turns."""
        return self._control is not None and self._control.search(text) is not None

    def parts(
        self, ids: Sequence[int], history: Literal["new", "all"], messages: Sequence[Mapping[str, Any]] | None
    ) -> list[Part]:
        """What is judged of a prompt; messages, where they are known, say who spoke."""
        text = self.decode(ids, special=True)
        if messages is not None:
            return chat.parts_of_messages(messages, text, history, self.controls)
        return chat.parts_of(text, self.markers, history, self.plain)

    def rewritten(
        self,
        ids: Sequence[int],
        parts: Sequence[Part],
        texts: Mapping[str, str],
        messages: Sequence[Mapping[str, Any]] | None,
    ) -> list[int]:
        """Tokens of a prompt whose parts now read as in `texts`; all around them stays."""
        changed = [p for p in parts if texts.get(p.name, p.text) != p.text]
        new = {p.name: self._harmless(texts[p.name]) for p in changed}
        if messages is not None and any(p.start < 0 for p in changed):
            return self._rendered_again(messages, parts, new)
        text = self.decode(ids, special=True)
        for part in sorted(changed, key=lambda p: -p.start):
            text = text[: part.start] + new[part.name] + text[part.end :]
        return self.encode(text)

    def _harmless(self, text: str) -> str:
        """A rewritten text must not open a turn of its own; taking a token out may put another together."""
        while self._control is not None and self._control.search(text):
            text = self._control.sub("", text)
        return text

    def _rendered_again(
        self, messages: Sequence[Mapping[str, Any]], parts: Sequence[Part], new: Mapping[str, str]
    ) -> list[int]:
        by_text = {p.text: new[p.name] for p in parts if p.name in new and isinstance(p.text, str)}
        if not by_text.keys() <= {m["content"] for m in messages if isinstance(m["content"], str)}:
            raise CheckFailed("safeguard", "a part of a message cannot be rewritten")
        turns = [{**m, "content": by_text.get(m["content"], m["content"])} for m in map(dict, messages)]
        prefill = str(turns[-1]["role"]) == "assistant"
        with self._lock:
            text = self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=not prefill, continue_final_message=prefill
            )
        return self.encode(text)

    def _render(self, messages: list[dict[str, str]], generation: bool) -> str:
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
        return self.decode(self.encode(text), special=True)  # as prompts will read, spaces and all


def _any_of(words: set[str]) -> re.Pattern[str] | None:
    if not words:
        return None
    return re.compile("|".join(re.escape(w) for w in sorted(words, key=len, reverse=True)))
