"""Ciphers that keep words apart: rot13, atbash, words and sentences written backwards, the spelling alphabet.

They are found by their words: strange ones that are common words once deciphered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from string import ascii_lowercase, ascii_uppercase

from safeguard.text.view import Edit
from safeguard.text.words import ranks

ROT13 = str.maketrans(
    ascii_lowercase + ascii_uppercase,
    ascii_lowercase[13:] + ascii_lowercase[:13] + ascii_uppercase[13:] + ascii_uppercase[:13],
)
_ATBASH = str.maketrans(ascii_lowercase + ascii_uppercase, ascii_lowercase[::-1] + ascii_uppercase[::-1])


def _rot13(text: str) -> str:
    return text.translate(ROT13)


def _atbash(text: str) -> str:
    return text.translate(_ATBASH)


def _backwards(text: str) -> str:
    return text[::-1]


_CIPHERS: tuple[Callable[[str], str], ...] = (_rot13, _atbash, _backwards)
_WORD = re.compile(r"[A-Za-z]+")
_LETTERS = bytes(ord(c.lower() if c.isalpha() else " ") for c in map(chr, range(128))) + b" " * 128
_LONGEST = 24  # letters of a word
_ENOUGH: dict[Callable[[str], str], int] = {_rot13: 4, _atbash: 4, _backwards: 5}
"""Letters of a strange word that counts alone; of shorter ones it takes two ("knab" is a name, no bank)."""
_LETTER_NAMES = (
    "alfa|alpha|bravo|charlie|delta|echo|foxtrot|golf|hotel|india|juliett?|kilo|lima|mike|november|oscar|papa|"
    "quebec|romeo|sierra|tango|uniform|victor|whiske?y|xray|yankee|zulu"
)
_MANY = frozenset(_LETTER_NAMES.replace("?", "").split("|"))
_NAME = rf"(?:{_LETTER_NAMES})\b"
_SPELLED = re.compile(rf"\b{_NAME}(?:[ \t,-]{{1,3}}{_NAME}){{2,}}+", re.IGNORECASE)


def may_be_cipher(text: str) -> bool:
    """Whether any cipher may be found; costs a look-up for each word."""
    words = set(text.encode("ascii", "replace").translate(_LETTERS).decode("ascii").split())
    known = ranks()
    strange = [word for word in words.difference(known) if 3 <= len(word) <= _LONGEST]
    if strange and any(_is_enough([w for w in strange if c(w) in known], c) for c in _CIPHERS):
        return True
    return not words.isdisjoint(_MANY) and _SPELLED.search(text) is not None


def _is_enough(words: list[str], cipher: Callable[[str], str]) -> bool:
    return len(words) > 1 or any(len(word) >= _ENOUGH[cipher] for word in words)


def decipher(text: str) -> Iterator[Edit]:
    """Puts runs of enciphered words in clear, by the cipher that explains most of them."""
    known = ranks()
    tokens = list(_WORD.finditer(text))
    low = [m.group().lower() for m in tokens]
    best: list[tuple[int, int, Callable[[str], str]]] = []
    most = 0
    for cipher in _CIPHERS:
        runs = list(_runs(low, cipher, known))
        explained = sum(end - start for start, end in runs)
        if explained > most:
            most, best = explained, [(start, end, cipher) for start, end in runs]
    for first, last, cipher in best:
        start, end = tokens[first].start(), tokens[last - 1].end()
        yield start, end, cipher(text[start:end])


def _runs(words: list[str], cipher: Callable[[str], str], known: dict[str, int]) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of words that make sense under a cipher, and no sense as they stand."""
    first: int | None = None
    last = 0
    hits: list[str] = []
    for i, word in enumerate([*words, "the"]):
        clear = cipher(word) if len(word) <= _LONGEST else ""
        if len(word) > 2 and word not in known and clear in known:
            first, last = i if first is None else first, i + 1
            hits.append(word)
        elif len(word) > 2 and word in known and clear not in known:
            if first is not None and _is_enough(hits, cipher):
                yield _widened(words, first, last, cipher, known)
            first, hits = None, []


def _widened(
    words: list[str], first: int, last: int, cipher: Callable[[str], str], known: dict[str, int]
) -> tuple[int, int]:
    """The run with the words at its edges that are commoner ones under the cipher ("jung": what).

    To a run of several words belong those beside it that are none as they stand: misspelt or rare ones.
    """
    several = last - first > 1

    def belongs(word: str) -> bool:
        clear = known.get(cipher(word)) if len(word) <= _LONGEST else None
        if clear is None:
            return (several or len(word) == 2) and word not in known
        return clear < known.get(word, len(known))

    while first and belongs(words[first - 1]):
        first -= 1
    while last < len(words) and belongs(words[last]):
        last += 1
    return first, last


def read_alphabet(text: str) -> Iterator[Edit]:
    """Words of the spelling alphabet to the letters that they stand for: "Kilo India Lima Lima"."""
    for match in _SPELLED.finditer(text):
        yield match.start(), match.end(), "".join(word[0].lower() for word in _WORD.findall(match.group()))
