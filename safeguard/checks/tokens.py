"""Text to token ids without loss: nothing truncated, no special tokens from users, no word too long."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from numpy.typing import NDArray

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_PIECE = 100  # WordPiece turns a word of more characters than this into one unknown token
_PROBES = ("a", "the", "0", ".", "hello")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids of one text, without special tokens, and the characters that each came from (start, end)."""

    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]


class TokenCutter:
    """Tokenises whole texts and dresses any window of them in the model's special tokens.

    The tokenizer given is copied, never changed. Special tokens written out in a text ("[SEP]") stay plain
    text. digest: SHA-256 of the tokenizer; equal ones give equal tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        copy = Tokenizer.from_str(tokenizer.to_str())
        copy.no_padding()
        copy.no_truncation()
        self.prefix, self.suffix = _special_tokens(copy)
        padding = tokenizer.padding or {}
        self.pad_id = int(padding.get("pad_id", _pad_id(copy)))
        unknown = getattr(copy.model, "unk_token", None)
        self._unknown_id = copy.token_to_id(unknown) if isinstance(unknown, str) else None
        self.digest = hashlib.sha256(copy.to_str().encode()).hexdigest()
        copy.encode_special_tokens = True
        self._tokenizer = copy

    @property
    def special_tokens(self) -> int:
        """How many special tokens a window gets."""
        return len(self.prefix) + len(self.suffix)

    def __call__(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of each text; offsets count the characters of the text as given."""
        clean = [text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text) for text in texts]
        if len(clean) == 1:  # in this thread: waking the tokenizer's own costs more than it saves
            encoded = [self._tokenizer.encode(clean[0], add_special_tokens=False)]
        else:
            encoded = self._tokenizer.encode_batch(clean, add_special_tokens=False)
        return [self._tokens(text, e.ids, e.offsets) for text, e in zip(clean, encoded, strict=True)]

    def _tokens(self, text: str, ids: list[int], offsets: list[tuple[int, int]]) -> Tokens:
        if self._unknown_id is not None and self._unknown_id in ids:
            ids, offsets = self._split_unknown(text, ids, offsets)
        return Tokens(np.array(ids, np.int64), np.array(offsets, np.int64).reshape(-1, 2))

    def _split_unknown(
        self, text: str, ids: list[int], offsets: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """The same tokens with each over-long unknown word cut into pieces that the vocabulary can spell."""
        new_ids: list[int] = []
        new_offsets: list[tuple[int, int]] = []
        for token, (start, end) in zip(ids, offsets, strict=True):
            if token != self._unknown_id or end - start <= _PIECE:
                new_ids.append(token)
                new_offsets.append((start, end))
                continue
            starts = range(start, end, _PIECE)
            pieces = [text[s : min(s + _PIECE, end)] for s in starts]
            for at, e in zip(
                starts, self._tokenizer.encode_batch(pieces, add_special_tokens=False), strict=True
            ):
                new_ids.extend(e.ids)
                new_offsets.extend((at + s, at + t) for s, t in e.offsets)
        return new_ids, new_offsets


def _special_tokens(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a text."""
    for probe in _PROBES:
        bare = tokenizer.encode(probe, add_special_tokens=False).ids
        full = tokenizer.encode(probe, add_special_tokens=True).ids
        for at in range(len(full) - len(bare) + 1):
            if bare and full[at : at + len(bare)] == bare:
                return full[:at], full[at + len(bare) :]
    raise ValueError(
        "the tokenizer gives no tokens for plain text, so its special tokens cannot be told apart"
    )


def _pad_id(tokenizer: Tokenizer) -> int:
    found = (tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>"))
    return next((i for i in found if i is not None), 0)
