"""How much of one set of texts stands in another: longest common span of words, Jaccard similarity.

The longest span is preferred to the sum of all matches (ConTAM 2024); a span of 8 words is no accident.
Two texts whose sets of words have a Jaccard similarity of 0.8 are one text in two forms.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

SPAN = 8
"""Words in a row that count as taken over."""
JACCARD = 0.8
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.casefold())


def longest_spans(items: Sequence[str], corpus: Sequence[str]) -> NDArray[np.int64]:
    """Most words in a row that each item shares with any text of the corpus, (item,)."""
    wanted = [words_of(item) for item in items]
    known = [words_of(text) for text in corpus]
    spans = np.zeros(len(wanted), np.int64)
    left = set(range(len(wanted)))
    size = 0
    while left:  # what shares no span of n words shares none of n + 1
        size += 1
        grams = {gram for words in known for gram in _grams(words, size)}
        left = {i for i in left if not grams.isdisjoint(_grams(wanted[i], size))}
        spans[list(left)] = size
    return spans


def nearest_jaccard(
    items: Sequence[str], corpus: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Of each item, its largest Jaccard similarity (of sets of words) to a text of the corpus, and which.

    0 and -1 where it shares no word with any.
    """
    known = [set(words_of(text)) for text in corpus]
    sizes = np.array([len(words) for words in known], np.int64)
    places: dict[str, list[int]] = {}
    for i, words in enumerate(known):
        for word in words:
            places.setdefault(word, []).append(i)
    arrays = {word: np.array(where, np.int64) for word, where in places.items()}
    best, which = np.zeros(len(items)), np.full(len(items), -1, np.int64)
    for i, item in enumerate(items):
        words = set(words_of(item))
        found = [arrays[word] for word in words if word in arrays]
        if found:
            shared = np.bincount(np.concatenate(found), minlength=len(known))
            similarity = shared / (sizes + len(words) - shared)
            which[i] = int(similarity.argmax())
            best[i] = similarity[which[i]]
    return best, which


def contamination(items: Sequence[str], corpus: Sequence[str]) -> dict[str, Any]:
    """How much of the items stands in the corpus, and the numbers of those that do, never their text."""
    if not items or not corpus:
        raise ValueError("contamination needs texts on both sides")
    spans = longest_spans(items, corpus)
    lengths = np.array([max(1, len(words_of(item))) for item in items])
    similarity, _ = nearest_jaccard(items, corpus)
    taken = (spans >= SPAN) | (similarity >= JACCARD)
    return {
        "items": len(items),
        "corpus": len(corpus),
        "longest_span": int(spans.max()),
        "mean_span": float(spans.mean()),
        f"share_span_{SPAN}": float((spans >= SPAN).mean()),
        "share_half_of_words": float((spans * 2 >= lengths).mean()),
        "largest_jaccard": float(similarity.max()),
        "mean_jaccard": float(similarity.mean()),
        "share_jaccard": float((similarity >= JACCARD).mean()),
        "contaminated": np.flatnonzero(taken).tolist(),
    }


def contamination_report(
    toxic: Sequence[str], texts: Sequence[str], prompts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """All pairs that matter: prompts in the toxic corpus and in the texts, texts in the toxic corpus."""
    pairs = {
        "prompts in toxic corpus": (prompts, toxic),
        "prompts in texts": (prompts, texts),
        "texts in toxic corpus": (texts, toxic),
    }
    return {name: contamination(items, corpus) for name, (items, corpus) in pairs.items() if items and corpus}


def _grams(words: Sequence[str], size: int) -> set[str]:
    return {" ".join(words[i : i + size]) for i in range(len(words) - size + 1)}
