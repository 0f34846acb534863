"""Which texts of a test set have a near duplicate in the training data: word-set Jaccard, exact.

No hashing: an index over the rarest words of each text finds every pair at or over the threshold (prefix
filtering), so nothing is missed as with MinHash, and seventeen thousand training texts take about a second.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

_WORD = re.compile(r"\w+")


def word_set(text: str) -> frozenset[str]:
    """The different words of a text, in lower case."""
    return frozenset(_WORD.findall(text.lower()))


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """Shared words by all words, in [0, 1]; 1 for two texts without a word."""
    both = len(first | second)
    return len(first & second) / both if both else 1.0


def nearest(tests: Sequence[str], training: Sequence[str], *, threshold: float = 0.8) -> list[float]:
    """For each test text the largest Jaccard to a training text, 0 where that is under `threshold`.

    threshold: in (0, 1]; 0.8 is what is mostly counted as a near duplicate.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be in (0, 1], got {threshold}")
    known = list(dict.fromkeys(word_set(text) for text in training))
    wanted = [word_set(text) for text in tests]
    count = Counter(word for words in [*known, *wanted] for word in words)
    index: dict[str, list[int]] = defaultdict(list)
    for place, words in enumerate(known):
        for word in _rarest(words, count, threshold):
            index[word].append(place)
    empty = frozenset() in known
    out = []
    for words in wanted:
        places = {place for word in _rarest(words, count, threshold) for place in index.get(word, ())}
        best = max((jaccard(words, known[place]) for place in places), default=float(empty and not words))
        out.append(best if best >= threshold else 0.0)
    return out


def _rarest(words: frozenset[str], count: Counter[str], threshold: float) -> list[str]:
    """So many of the rarest words that two texts at the threshold share one of theirs."""
    needed = math.ceil(threshold * len(words) - 1e-9)
    return sorted(words, key=lambda word: (count[word], word))[: len(words) - needed + 1]
