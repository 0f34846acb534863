"""Which pictures of a captioned set a prompt asks for, by the words that both share (tf-idf)."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_CONCEPTS = 4
"""Things that one picture shows at most; those that match best are kept."""

_KEYWORD_WEIGHT = 0.6  # a keyword says what a picture may also stand for, the caption what it is
_SHARPNESS = 2.0  # nats between a full match and none, at guidance 1
_MAX_WORDS = 512  # more words than this are not read, as a text encoder has its window
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True)
class Concept:
    """One thing that a prompt asks for: log-probability of each picture of the set, (picture,) float64."""

    log_prior: NDArray[np.float64]

    @property
    def best(self) -> int:
        """Index of the likeliest picture; the first one of equals."""
        return int(np.argmax(self.log_prior))


class CaptionIndex:
    """Captions and keywords of a set of pictures, ready to be matched with prompts."""

    def __init__(self, captions: Sequence[str], keywords: Sequence[str]) -> None:
        if not captions or len(captions) != len(keywords):
            raise ValueError(
                f"give keywords for each of one or more captions, got {len(captions)} and {len(keywords)}"
            )
        caption_terms = [set(terms(text)) for text in captions]
        every = [c | set(terms(k)) for c, k in zip(caption_terms, keywords, strict=True)]
        counts = Counter(term for found in every for term in found)
        self._place = {term: i for i, term in enumerate(counts)}
        rarity = np.array([math.log(1 + len(captions) / n) for n in counts.values()])
        self._weights = np.zeros((len(captions), len(counts)))  # (picture, term): tf-idf
        self._is_caption = np.zeros(self._weights.shape, bool)
        for row, (own, found) in enumerate(zip(caption_terms, every, strict=True)):
            for term in found:
                place = self._place[term]
                self._weights[row, place] = rarity[place] * (1 if term in own else _KEYWORD_WEIGHT)
                self._is_caption[row, place] = term in own
        self._mass = (self._weights * self._is_caption).sum(axis=1)

    def concepts(self, prompt: str, negative: str = "", *, guidance: float = 7.5) -> list[Concept]:
        """What the prompt asks for, in its order; one uniform concept where no word of it is known.

        guidance: exponent of p(picture | prompt) against the uniform p(picture); at 0 the prompt is ignored.
        Pictures that the negative text asks for lose as much as they would gain from the prompt.
        """
        known = self._known(prompt)
        against = self._match(set(self._known(negative)))
        against = against / max(float(against.max()), 1e-9)
        left = set(known)
        modifiers = set(_words()["modifiers"])
        found: list[tuple[float, int, Concept]] = []
        while left - modifiers:
            score = self._match(left)
            best = score.max()
            if best <= 0:
                break
            covered = {t for t in left if self._weights[int(np.argmax(score)), self._place[t]] > 0}
            left -= covered
            if covered <= modifiers:
                continue
            own = self._match(covered)  # without what the other words of the prompt ask for
            concept = Concept(_log_softmax(guidance * _SHARPNESS * (own / own.max() - against)))
            if own[concept.best] > 0 and against[concept.best] < 1:
                found.append((float(best), min(known.index(t) for t in covered), concept))
        strongest = sorted(found, key=lambda f: -f[0])[:MOST_CONCEPTS]
        if strongest:
            return [concept for _, _, concept in sorted(strongest, key=lambda f: f[1])]
        return [Concept(_log_softmax(-guidance * _SHARPNESS * against))]

    def _known(self, text: str) -> list[str]:
        return [term for term in dict.fromkeys(terms(text)) if term in self._place]

    def _match(self, wanted: set[str]) -> NDArray[np.float64]:
        """Score of each picture for these terms: weight of those shared, less where the caption says more."""
        if not wanted:
            return np.zeros(len(self._weights))
        places = [self._place[term] for term in sorted(wanted)]
        shared = self._weights[:, places]
        said = (shared * self._is_caption[:, places]).sum(axis=1) / self._mass
        score: NDArray[np.float64] = shared.sum(axis=1) * (0.5 + 0.5 * said)
        return score


def terms(text: str) -> list[str]:
    """Stems of the words of a text, in order, without the little words."""
    words = [match.group() for match in _WORD.finditer(text.casefold())][:_MAX_WORDS]
    stop = set(_words()["stop"])
    return [stem(word) for word in words if word not in stop]


def stem(word: str) -> str:
    """The word without its commonest English endings: smoking, smokes and smoke give one stem."""
    word = _words()["irregular"].get(word, word)
    if len(word) > 4 and word.endswith("ies"):
        word = word[:-3] + "y"
    elif len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us")):
        word = word[:-1]
    for ending in ("ing", "ed"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            if word[-1] == word[-2] and word[-1] not in "ls":  # running -> run, but not filling -> fil
                word = word[:-1]
            break
    return word[:-1] if len(word) > 3 and word.endswith("e") else word


@cache
def _words() -> dict[str, Any]:
    """Word lists: `stop` are skipped, `modifiers` make no thing of their own (red paint is no red car)."""
    file = resources.files("safeguard.demo") / "data" / "words.json"
    words: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return words


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result
