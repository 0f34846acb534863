"""The common English words that a disguised word is compared with, and how to part words run together."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from math import log
from pathlib import Path

_LONGEST = 16  # of the words tried when parting
_STRANGER = 15.0  # cost of a letter that belongs to no word, more than that of any word


@cache
def ranks() -> dict[str, int]:
    """Word -> its place by frequency, 0 for the most frequent."""
    path = Path(__file__).parent.parent / "data" / "words.txt"
    lines = path.read_text(encoding="utf-8").splitlines()
    return {word: i for i, word in enumerate(line for line in lines if not line.startswith("#"))}


def commonest(candidates: Iterable[str]) -> str | None:
    """The most frequent of the candidates (lower case), None where none is a word."""
    known = ranks()
    return min((c for c in candidates if c in known), key=known.__getitem__, default=None)


def borders(letters: str) -> set[int]:
    """Offsets in a run of letters at which a new word begins, by the likeliest reading ("ihateyou": 1, 5).

    Linear in the length. Letters that belong to no word stay together.
    """
    known = ranks()
    text = letters.lower()
    best: list[tuple[float, int, bool]] = [
        (0.0, 0, True)
    ]  # cost so far, where the last piece began, whether a word
    for end in range(1, len(text) + 1):
        choices = [(best[end - 1][0] + _STRANGER, end - 1, False)]
        for start in range(max(0, end - _LONGEST), end):
            rank = known.get(text[start:end])
            if rank is not None:
                choices.append((best[start][0] + log(rank + 10) + 2.0, start, True))
        best.append(min(choices))
    found: set[int] = set()
    end, word_after = len(text), False
    while end:
        _, start, is_word = best[end]
        if end < len(text) and (is_word or word_after):
            found.add(end)
        end, word_after = start, is_word
    return found
