"""One tokenisation for all checks of a call whose tokenizers are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

Memo = dict[tuple[str, str], Any]
"""(digest of a tokenizer, text) -> tokens. Lives as long as the call that it was made for, and no longer."""


class TextBatch(list[str]):
    """The texts of one call, as every check of that call gets them, and what was tokenised of them already.

    A plain list to checks that do not know of it. No lock: what two checks write at once is the same.
    """

    def __init__(self, texts: Iterable[str] = (), memo: Memo | None = None) -> None:
        super().__init__(texts)
        self.memo: Memo = {} if memo is None else memo


def tokenise_once(batch: Iterable[str], digest: str, tokenise: Callable[[list[str]], list[T]]) -> list[T]:
    """Tokens of each text in order; those that another check of the same call has made are used again.

    digest: of the tokenizer. tokenise: makes the tokens of the texts that are new, each text once.
    """
    texts = list(batch)
    memo = batch.memo if isinstance(batch, TextBatch) else {}
    new = [text for text in dict.fromkeys(texts) if (digest, text) not in memo]
    if new:
        memo.update(zip(((digest, text) for text in new), tokenise(new), strict=True))
    return [memo[digest, text] for text in texts]
