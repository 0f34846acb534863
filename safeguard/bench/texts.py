"""Texts to measure with: of a file of the user's, or made up with the lengths that real prompts have."""

from __future__ import annotations

import gzip
import json
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# BERT tokens, [CLS] and [SEP] among them, of 7,880 prompts to language models and as many to image
# generators: the share of them that is at most so long. Cut at 512, as the peers cut; the longest had 1,815.
_LENGTHS = (
    *((0.0, 3), (0.05, 9), (0.1, 10), (0.15, 11), (0.2, 12), (0.25, 13), (0.3, 14), (0.4, 15), (0.45, 16)),
    *((0.5, 17), (0.55, 18), (0.6, 19), (0.65, 20), (0.7, 22), (0.75, 25), (0.8, 31), (0.85, 42), (0.9, 63)),
    *((0.95, 90), (0.99, 227), (1.0, 512)),
)
# each is one token of BERT's vocabulary
_WORDS_TEXT = (
    "the and of in on with for to from old small quiet green red blue golden winter summer morning evening "
    "garden river bridge village market kitchen table window house tree forest mountain lake street boat "
    "bird horse dog cat child woman man teacher doctor story letter music painting photo light shadow rain "
    "snow cloud bread tea apple flower stone road train city school library book"
)
_WORDS = _WORDS_TEXT.split()
_SPECIAL_TOKENS = 2
SHORT_TOKENS = 20
_MOST_ROWS = 200_000


@dataclass(frozen=True)
class Texts:
    """Texts by length. `rows` is empty where they are made up."""

    rows: tuple[str, ...] = ()
    source: str = "made up, with the token lengths of real prompts: median 17, quartiles 13 and 25, mean 30"

    def draw(self, count: int, seed: int) -> list[str]:
        """One text from each of `count` equally likely ranges of length, so that few stand for all."""
        if count < 1:
            raise ValueError(f"at least one text must be drawn, got {count}")
        random_ = random.Random(seed)
        shares = [(i + random_.random()) / count for i in range(count)]
        if self.rows:
            return [self.rows[int(share * len(self.rows))] for share in shares]
        return [of_length(length_at(share), seed=random_.randrange(2**31)) for share in shares]


def read_texts(path: Path) -> Texts:
    """The `text` of every line of a JSONL file (or `.jsonl.gz`), or the lines of a text file.

    Raises ValueError for a line without text and a file without lines.
    """
    is_json = ".jsonl" in path.name
    rows = []
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            if number > _MOST_ROWS:
                raise ValueError(f"{path.name} has more than {_MOST_ROWS} lines; a sample of them is enough")
            rows.append(_text_of(line, f"{path.name}:{number}") if is_json else line.strip())
    if not rows:
        raise ValueError(f"{path.name} holds no texts")
    return Texts(tuple(sorted(rows, key=len)), f"{len(rows)} texts of a file")


def of_length(tokens: int, *, seed: int = 0) -> str:
    """A harmless text of that many BERT tokens, [CLS] and [SEP] among them; 3 at least."""
    random_ = random.Random(seed)
    return " ".join(random_.choices(_WORDS, k=max(1, tokens - _SPECIAL_TOKENS)))


def length_at(share: float) -> int:
    """How many tokens a real prompt has of which that share are no longer, linear between known points."""
    at = bisect_right(_LENGTHS, share, key=lambda point: point[0])
    if at == len(_LENGTHS):
        return _LENGTHS[-1][1]
    (low, short), (high, long) = _LENGTHS[at - 1], _LENGTHS[at]
    return round(short + (share - low) / (high - low) * (long - short))


def mean_length(count: int = 10_000) -> float:
    """Mean number of tokens of made up texts."""
    return sum(length_at((i + 0.5) / count) for i in range(count)) / count


def characters(texts: Sequence[str]) -> list[int]:
    """Lengths of texts, for the record; the texts themselves never are in it."""
    return sorted(len(text) for text in texts)


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as exc:
        raise ValueError(f"{where} is no JSON: {exc}") from exc
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where} has no text; a line is {{"text": "..."}}')
    return text
