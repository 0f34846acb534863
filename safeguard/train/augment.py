"""Disguises for text, as people use them to slip past a filter: for training, and others of them for testing.

Every disguise is `(random, text, variety) -> text`. The two varieties, "train" and "test", use other
characters, rates and padding, so that a test measures the kind of trick and not the very characters learned.
All of it is seeded by the `random.Random` given and keeps the label of the text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Literal

Variety = Literal["train", "test"]
Disguise = Callable[[random.Random, str, Variety], str]

_WORD = re.compile(r"[^\W\d_]{3,}")

_LEET: dict[Variety, dict[str, str]] = {
    "train": {"a": "4@", "e": "3", "i": "1!", "o": "0", "s": "5$", "t": "7", "l": "1", "b": "8"},
    "test": {"a": "4", "e": "3", "i": "1", "o": "0", "s": "5", "t": "7+", "g": "9"},
}
_SEPARATORS: dict[Variety, tuple[str, ...]] = {"train": (" ", ".", "-", " "), "test": (" ", "_", "*")}
_ZERO_WIDTH: dict[Variety, str] = {"train": "\u200b\u200d\u2060", "test": "\u200c\ufeff\u00ad"}
_COMBINING: dict[Variety, str] = {"train": "\u0301\u0308\u0323\u0336", "test": "\u0300\u0302\u0331\u0335"}
_HOMOGLYPHS: dict[Variety, dict[str, str]] = {
    "train": dict(zip("aceopxyisjhk", "асеорхуіѕјһк", strict=True)),
    "test": dict(zip("aoevinkpty", "αοєνιпκρτү", strict=True)),
}
_EMOJI: dict[Variety, tuple[str, ...]] = {
    "train": ("😂", "🔥", "👀", "✨", "💯", "🙂", "😭", "🎉", "🤔", "🌸", "😎", "🙏"),
    "test": ("😅", "⭐", "💥", "🍀", "🥳", "😇", "🫶", "🚀"),
}
_PADDING: dict[Variety, tuple[str, ...]] = {
    "train": (
        "Thanks for reading, I hope that you have a pleasant day.",
        "The weather in the valley was mild and the river ran slowly past the old mill.",
        "Our library opens at nine and closes at six on weekdays.",
        "Please find the agenda for tomorrow's meeting below.",
        "My grandmother used to bake apple bread on Sunday mornings.",
        "The train leaves from platform four and arrives a little before noon.",
        "She planted tomatoes, basil and a row of sunflowers along the fence.",
        "The museum shows a collection of clocks from four centuries.",
        "In the second chapter the author explains how bridges carry their load.",
        "We watched the boats come back to the harbour in the evening light.",
        "The recipe calls for two cups of flour, one egg and a pinch of salt.",
        "He has been learning the piano for three years and likes Schubert best.",
        "The committee will publish its notes on the website by Friday.",
        "A gentle breeze moved the curtains while the cat slept on the chair.",
        "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
        "The new version fixes a small error in the date picker.",
    ),
    "test": (
        "It was a quiet afternoon and the children were flying kites in the park.",
        "The shop around the corner sells fresh bread and good coffee.",
        "Glaciers shape valleys over many thousands of years.",
        "I would like to thank everybody who helped to organise the concert.",
        "The manual describes how to change the filter of the machine.",
        "Two herons stood in the shallow water near the reeds.",
        "Registration for the evening course starts next month.",
        "The carpenter measured the shelf twice before cutting the board.",
        "Jupiter has dozens of moons, and some of them hide oceans under ice.",
        "My colleague brought homemade biscuits to the office today.",
    ),
}


def _rate(rng: random.Random, variety: Variety) -> float:
    return 0.8 if variety == "test" else rng.uniform(0.3, 1.0)


def _each_word(rng: random.Random, text: str, share: float, change: Callable[[str], str]) -> str:
    """`change` applied to about `share` of the words of three letters or more, and to at least one."""
    words = list(_WORD.finditer(text))
    if not words:
        return text
    chosen = {i for i in range(len(words)) if rng.random() < share} or {rng.randrange(len(words))}
    out, last = [], 0
    for i, match in enumerate(words):
        out.append(text[last : match.start()])
        out.append(change(match.group()) if i in chosen else match.group())
        last = match.end()
    return "".join(out) + text[last:]


def leetspeak(rng: random.Random, text: str, variety: Variety) -> str:
    """Letters become look-alike digits: "h4te"."""
    table, rate = _LEET[variety], _rate(rng, variety)

    def change(word: str) -> str:
        return "".join(
            rng.choice(table[c.lower()]) if c.lower() in table and rng.random() < rate else c for c in word
        )

    return _each_word(rng, text, 1.0 if variety == "test" else rng.uniform(0.3, 1), change)


def spacing(rng: random.Random, text: str, variety: Variety) -> str:
    """Letters of words are set apart: "h a t e", "h.a.t.e"."""
    separator = rng.choice(_SEPARATORS[variety])
    return _each_word(rng, text, 0.5 if variety == "test" else rng.uniform(0.2, 1), separator.join)


def zero_width(rng: random.Random, text: str, variety: Variety) -> str:
    """Invisible characters stand between letters."""
    marks = _ZERO_WIDTH[variety]
    return _each_word(rng, text, _rate(rng, variety), lambda word: rng.choice(marks).join(word))


def combining(rng: random.Random, text: str, variety: Variety) -> str:
    """Letters carry accents and strokes that do not belong to them."""
    marks, rate = _COMBINING[variety], _rate(rng, variety)
    return "".join(c + rng.choice(marks) if c.isalpha() and rng.random() < rate else c for c in text)


def homoglyphs(rng: random.Random, text: str, variety: Variety) -> str:
    """Letters of another script that look the same."""
    table, rate = _HOMOGLYPHS[variety], _rate(rng, variety)
    return "".join(table.get(c.lower(), c) if rng.random() < rate else c for c in text)


def fullwidth(rng: random.Random, text: str, variety: Variety) -> str:
    """Latin letters in their wide East Asian forms."""
    del variety
    wide = str.maketrans({chr(c): chr(c + 0xFEE0) for c in range(0x21, 0x7F)})
    return (
        text.translate(wide)
        if rng.random() < 0.5
        else _each_word(rng, text, 0.6, lambda w: w.translate(wide))
    )


def emoji(rng: random.Random, text: str, variety: Variety) -> str:
    """Pictures stand between the words."""
    words = text.split(" ")
    every = rng.randint(1, 4) if variety == "train" else 2
    return "".join(
        word + (f" {rng.choice(_EMOJI[variety])} " if i % every == every - 1 else " ")
        for i, word in enumerate(words)
    ).rstrip(" ")


def letter_case(rng: random.Random, text: str, variety: Variety) -> str:
    """Capitals where they do not belong."""
    if variety == "train" and rng.random() < 0.5:
        return text.upper()
    return "".join(c.upper() if rng.random() < 0.5 else c.lower() for c in text)


def repeats(rng: random.Random, text: str, variety: Variety) -> str:
    """Letters are drawn out: "haaate"."""
    most = 5 if variety == "train" else 4

    def change(word: str) -> str:
        at = rng.randrange(len(word))
        return word[:at] + word[at] * rng.randint(2, most) + word[at + 1 :]

    return _each_word(rng, text, 0.6 if variety == "test" else rng.uniform(0.2, 0.9), change)


def swapped_letters(rng: random.Random, text: str, variety: Variety) -> str:
    """Two neighbouring inner letters of a word change places: "htae"."""

    def change(word: str) -> str:
        if len(word) < 4:
            return word
        at = rng.randrange(1, len(word) - 2)
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]

    return _each_word(rng, text, 0.5 if variety == "test" else rng.uniform(0.2, 0.8), change)


def dropped_letters(rng: random.Random, text: str, variety: Variety) -> str:
    """Inner letters are missing or starred out: "ht", "h*te"."""
    stands = ("", "*", "-") if variety == "train" else ("", "*", "#")
    stand = rng.choice(stands)

    def change(word: str) -> str:
        if len(word) < 4:
            return word
        at = rng.randrange(1, len(word) - 1)
        return word[:at] + stand + word[at + 1 :]

    return _each_word(rng, text, 0.5 if variety == "test" else rng.uniform(0.2, 0.7), change)


def _padding(rng: random.Random, variety: Variety) -> str:
    most = 6 if variety == "train" else 8
    least = 1 if variety == "train" else 4
    return " ".join(rng.choices(_PADDING[variety], k=rng.randint(least, most)))


def padded_start(rng: random.Random, text: str, variety: Variety) -> str:
    """Harmless sentences before the text."""
    return f"{_padding(rng, variety)} {text}"


def padded_end(rng: random.Random, text: str, variety: Variety) -> str:
    """Harmless sentences after the text."""
    return f"{text} {_padding(rng, variety)}"


def padded_around(rng: random.Random, text: str, variety: Variety) -> str:
    """Harmless sentences on both sides: the text sits in the middle."""
    return f"{_padding(rng, variety)} {text} {_padding(rng, variety)}"


def split_sentences(rng: random.Random, text: str, variety: Variety) -> str:
    """Full stops and line breaks where no sentence ends."""
    words = text.split()
    every = rng.randint(2, 5) if variety == "train" else 3
    mark = rng.choice((". ", "\n", "... ", " / ") if variety == "train" else (". ", "\n\n", " | "))
    return mark.join(" ".join(words[i : i + every]) for i in range(0, len(words), every))


DISGUISES: dict[str, Disguise] = {
    "leetspeak": leetspeak,
    "spacing": spacing,
    "zero_width": zero_width,
    "combining": combining,
    "homoglyphs": homoglyphs,
    "fullwidth": fullwidth,
    "emoji": emoji,
    "letter_case": letter_case,
    "repeats": repeats,
    "swapped_letters": swapped_letters,
    "dropped_letters": dropped_letters,
    "padded_start": padded_start,
    "padded_end": padded_end,
    "padded_around": padded_around,
    "split_sentences": split_sentences,
}

_WEIGHTS: dict[str, float] = {
    "leetspeak": 2,
    "spacing": 1.5,
    "swapped_letters": 4,
    "dropped_letters": 4,
    "repeats": 2,
    "emoji": 2,
    "padded_start": 1.5,
    "padded_end": 1.5,
    "padded_around": 1.5,
}
"""How often each is drawn, 1 where absent: more of what normalisation cannot undo."""


UNDONE = frozenset({"leetspeak", "spacing", "zero_width", "combining", "homoglyphs", "fullwidth"})
"""Disguises that normalisation takes off again."""


def draw_disguise(rng: random.Random) -> str:
    """The name of a disguise, drawn by weight."""
    names = list(DISGUISES)
    return rng.choices(names, [_WEIGHTS.get(name, 1.0) for name in names])[0]


def disguise(text: str, seed: int, *, name: str, variety: Variety = "train") -> str:
    """`text` under the disguise `name`; the same seed gives the same text."""
    return DISGUISES[name](random.Random(seed), text, variety)
