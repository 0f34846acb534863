"""Disguises made of plain letters, digits and signs: spacing "k i l l", leetspeak "k1ll", repeats "kiiiill".

Each function gives the edits that undo one of them. All are linear in the length of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

from safeguard.text.view import Edit
from safeguard.text.words import borders, commonest, ranks

_UNIT = r"[A-Za-z0-9@$!]"
_MARK = r"[.\-_*|/~,·•]"
_SPACED = rf"(?<![A-Za-z0-9'’]){_UNIT}(?P<gap>[ \t\n]){_UNIT}(?:(?P=gap){_UNIT})+(?![A-Za-z0-9])"
_MARKED = (
    rf"(?<![A-Za-z0-9]){_UNIT}(?P<mark> ?{_MARK} ?|{_MARK}{{2}}){_UNIT}(?:(?P=mark){_UNIT})+(?![A-Za-z0-9])"
)
_APART = re.compile(f"{_SPACED}|{_MARKED}")

_SIGNS = "0123456789@$!+|"
_ROUGH = (
    bytes(  # letters become "a", digits "1", "$@" "$", "!+|" "!", control characters "c", all else "."
        ord("a" if c.isalpha() else "1" if c.isdigit() else "$" if c in "$@" else "!" if c in "!+|" else ".")
        if c.isprintable() or c in "\t\n\r"
        else ord("c")
        for c in map(chr, range(128))
    )
    + b"." * 128
)
_UNITS = bytes(c.isalnum() or c in "@$!'" for c in map(chr, range(128))) + bytes(128)


def is_suspect(text: str) -> bool:
    """Whether an ASCII text may hold anything that is undone here, or control characters.

    True too often, never too rarely. Costs a microsecond or two for a sentence.
    """
    data = text.encode("ascii", "replace")
    return (
        _may_be_leetspeak(data)
        or _may_be_drawn(data)
        or _may_be_spaced(data)
        or b"c" in data.translate(_ROUGH)
    )


def _may_be_spaced(data: bytes) -> bool:
    units = int.from_bytes(
        data.translate(_UNITS), "little"
    )  # one byte a character: 1 where it may be set apart
    alone = units & ~(units << 8) & ~(units >> 8)
    return alone & (alone >> 16 | alone >> 24 | alone >> 32) != 0  # two of them one to three characters apart


def _may_be_leetspeak(data: bytes) -> bool:
    rough = data.translate(_ROUGH)
    if b"1" in rough and b"a1" in rough:
        return True
    if b"$" in rough and (b"$a" in rough or b"a$" in rough or b"$$" in rough):
        return True
    return b"!" in rough and (b"a!a" in rough or b"a!1" in rough or b"a!$" in rough or b"a!!" in rough)


def _may_be_drawn(data: bytes) -> bool:
    number = int.from_bytes(data, "little")  # a zero byte where a character equals its neighbour
    return b"\0\0" in (number ^ number >> 8).to_bytes(len(data) or 1, "little")


def join_spaced(text: str) -> Iterator[Edit]:
    """Closes gaps between single letters; where they spell several words a space stays between those."""
    if not _may_be_spaced(text.encode("ascii", "replace")):
        return
    for match in _APART.finditer(text):
        gap = match["gap"] or match["mark"]
        run = match.group()
        step = 1 + len(gap)
        units = run[::step]
        letters = sum(c.isalpha() for c in units)
        if letters < 3 or letters * 2 < len(units):  # "1 2 3", "2 x 4", dates
            continue
        whole = letters < len(units) or len(units) < 4 or units.lower() in ranks()
        parted = set() if whole else borders(units)
        for i in range(1, len(units)):
            place = match.start() + i * step
            yield place - len(gap), place, " " if i in parted else ""


_LEET = {
    "4": "a", "@": "a", "8": "b", "3": "e", "6": "g", "9": "g", "1": "il", "!": "il", "|": "li",
    "0": "o", "5": "s", "$": "s", "7": "t", "+": "t",
}  # fmt: skip
_TOKEN = re.compile(r"[A-Za-z0-9@$!+|]+")
_ATE = re.compile(r"(?:h|gr|m|str)(8)(?:r?s?|d|ed|ers?|ing|ful)")
_PLAIN = re.compile(
    r"\d*(?:1st|2nd|3rd)|\d+(?:th|am|pm|[xkmbdghpwv]|[kmgt]i?b|[kcm]?m|[kmu]?g|lbs?|oz|ft|in|m?l|ms|k?hz|fps|px|bits?|way"
    r"|mins?|secs?|hrs?|yrs?|girls?|boys?)|\d\d+s"  # numbers with units, counted things in picture prompts
    r"|i18n|l10n|a11y|h1n1|h1b|m4[abv]|m3u|c3po|log4j|h5py|x11|sha\d\w*|md5\w*|base64|\d+x\d+|u?int\d+\w*|float\d+\w*"
    r"|[0-9a-f]*\d[0-9a-f]*\d[0-9a-f]{4,}"  # hashes
)
_MOST_ONES = 6  # readings double with each of "1!|"; beyond this only the first is tried
_LONGEST = 24  # characters of a token; longer ones are keys and digests, not words


def undo_leetspeak(text: str) -> Iterator[Edit]:
    """Turns digits and signs that stand for letters into those letters, one for one.

    A token is read so where that makes it a common English word and a sign stands between letters ("k1ll"),
    or where it has several signs between letters. Digits at the edges of a word ("mp3", "3d") count only in
    a text of which more than a twelfth is plainly leetspeak, or where they are doubled ("he11").
    """
    if not _may_be_leetspeak(text.encode("ascii", "replace")):
        return
    tokens = [m for m in _TOKEN.finditer(text) if not m.group().isdigit()]
    mixed = [m for m in tokens if not m.group().isalpha()]
    plain = {m.start(): _decode(m, text, bold=False) for m in mixed}
    bold = sum(r is not None for r in plain.values()) * 12 > len(tokens)
    for match in mixed:
        reading = plain[match.start()] or (_decode(match, text, bold=True) if bold else None)
        for i, new in enumerate(reading or ()):
            if new != match.group()[i]:
                yield match.start() + i, match.start() + i + 1, new


def _decode(match: re.Match[str], text: str, *, bold: bool) -> list[str] | None:
    """What each character of a token stands for, or None where the token is no disguised word."""
    token = match.group()
    after = text[match.end() : match.end() + 2]
    if "@" in token[1:] and after[:1] == "." and after[1:].isalnum():  # a mail address
        return None
    if text[match.start() - 1 : match.start()] in ("=", "%", "&", "\\"):
        return None
    if bold:  # "+" and a leading "!" may be letters too
        letters = _letters(token, token.lstrip("|").rstrip("!|@"), bold=True)
        if letters is not None:
            return letters
    return _letters(token, token.lstrip("!+|").rstrip("!+|@"), bold=bold)


def _letters(token: str, core: str, *, bold: bool) -> list[str] | None:
    """The same for the part of a token that is left without the punctuation around it."""
    if core.isalpha() or len(core) > _LONGEST:
        return None
    ate = _ATE.fullmatch(core.lower())
    if ate:
        letters = list(core)
        letters[ate.start(1)] = _sound(core, ate.start(1))
    else:
        word = _word(core, bold=bold)
        if word is None:
            return None
        letters = [c if c.isalpha() else new for c, new in zip(core, word, strict=True)]
        if core.upper() == core:
            letters = [c.upper() for c in letters]
    first = token.index(core)
    return [*token[:first], *letters, *token[first + len(core) :]]


def _sound(token: str, at: int) -> str:
    """What an 8 in a token spells: "h8" hate, "h8ing" hating, "gr8" great."""
    if token[at - 1] in "rR":
        return "eat"
    return "at" if token[at + 1 : at + 2] in ("e", "i", "E", "I") else "ate"


def _word(core: str, *, bold: bool) -> str | None:
    low = core.lower()
    if _PLAIN.fullmatch(low) or not all(c.isalpha() or c in _LEET for c in low):
        return None
    middle = low.strip(_SIGNS)
    inside = not middle.isalpha()
    if not bold and any(c in "!+|" for c in middle) and sum(map(str.isalpha, middle)) < 3:  # "a|b", "x+y"
        return None
    if not middle:
        return None
    word = commonest(_readings(low)) if len(low) > 2 or bold else None
    if word is not None:
        lead, trail = low[: low.index(middle[0])], low[low.rindex(middle[-1]) + 1 :]
        return word if inside or bold or (_sure(lead, "$@") and _sure(trail, "$")) else None
    signs = [c for c in low if c in _LEET]
    if not inside or len(middle) <= len(signs) or any(c in "!+|" for c in signs):
        return None
    groups = re.findall(r"[^a-z]+", middle)
    if bold or (
        all(len(set(g)) == 1 for g in groups) and not core.isupper() and (len(low) > 6 or len(signs) > 1)
    ):
        return next(_readings(low))
    return None


def _sure(edge: str, signs: str) -> bool:
    """Whether signs at the edge of a word stand for letters: doubled, or of a kind that has no use there."""
    return all(c in signs for c in edge) or edge in ("00", "11", "55")


def _readings(low: str) -> Iterator[str]:
    several = sum(c in "1!|" for c in low) <= _MOST_ONES
    options = [(_LEET[c] if several else _LEET[c][0]) if c in _LEET else c for c in low]
    return ("".join(letters) for letters in product(*options))


_LETTERS = re.compile(r"[A-Za-z]+")
_DRAWN = re.compile(r"([a-z])\1{2,}", re.IGNORECASE | re.ASCII)
_DOUBLED = re.compile(r"([a-z])\1+", re.IGNORECASE | re.ASCII)
_MOST_RUNS = 6  # readings double with each run


def shorten_repeats(text: str) -> Iterator[Edit]:
    """Cuts letters repeated three times or more to one or two, whichever makes a common word, else to two.

    Where something in a word is drawn out, its double letters may be single ones too; where a word of the
    text is, a doubled letter of any other counts as drawn out if that makes a common word ("yoou"). Words
    ("www") and three of the same letter alone ("AAA") stay.
    """
    if not _may_be_drawn(text.encode("ascii", "replace")):
        return
    strange = [m for m in _LETTERS.finditer(text) if len(m.group()) > 3 and _DOUBLED.search(m.group())]
    strange = [m for m in strange if m.group().lower() not in ranks()]
    if not any(_DRAWN.search(m.group()) for m in strange):
        return
    for match in strange:
        word = match.group()
        runs = list(_DOUBLED.finditer(word))
        counts = (2,) * len(runs)
        if len(runs) <= _MOST_RUNS:
            readings = {_cut(word, runs, c): c for c in product((2, 1), repeat=len(runs))}
            best = commonest(r for r in readings if len(r) > 1)
            counts = readings[best] if best else counts
        for run, count in zip(runs, counts, strict=True):
            start = match.start() + run.start() + count - 1
            end = match.start() + run.end()
            if end - start > 1:
                yield start, end, run.group()[0]


def _cut(word: str, runs: list[re.Match[str]], counts: tuple[int, ...]) -> str:
    pieces, last = [], 0
    for run, count in zip(runs, counts, strict=True):
        pieces.append(word[last : run.start()] + run.group()[0] * count)
        last = run.end()
    return ("".join(pieces) + word[last:]).lower()
