"""Disguises made of other characters: look-alikes, marks, what is invisible or hidden, and emoji as words."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache, lru_cache
from pathlib import Path

from safeguard.text.view import Edit
from safeguard.text.words import ranks

_INVISIBLE = (
    "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    "\U000e0000-\U000e0fff"
)
_JOINED = (
    "\u0600-\u109f\u1780-\u18af\u1a20-\u1cff\ua800-\uabff\ufb1d-\ufdff\ufe70-\ufefc\U00010a00-\U00011fff"
)
"""Scripts in which a joiner or non-joiner after a letter is spelling: Arabic, the Indic ones, Mongolian."""

_EMOJI = (
    "\u231a\u231b\u23e9-\u23f3\u2600-\u27bf\u2934\u2935\u2b05-\u2b55\u3030\u303d\u3297\u3299"
    "\U0001f000-\U0001faff"
)
_TONE = "\U0001f3fb-\U0001f3ff"
_AFTER = f"[\ufe0f{_TONE}]"

_HIDDEN = re.compile(
    f"(?P<flags>[\U0001f1e6-\U0001f1ff]+)"
    f"|(?P<emoji>(?:[{_EMOJI}]|[#*0-9\u203c-\u25ff](?=\ufe0f))(?:{_AFTER}|\u20e3|\u200d(?=[{_EMOJI}\u2190-\u25ff])[{_EMOJI}"
    f"\u2190-\u25ff])*(?:[\U000e0020-\U000e007e]+\U000e007f)?)"
    f"|(?P<tags>[\U000e0020-\U000e007f]+)"
    f"|(?P<selectors>[\ufe00-\ufe0f\U000e0100-\U000e01ef]{{2,}})"
    f"|(?P<bits>[\u2062\u2064]{{7,}}(?:\u200b+[\u2062\u2064]+)*)"
    f"|[{_INVISIBLE}]+"
    f"|(?<![{_JOINED}])[\u200c\u200d]+"
    f"|(?<=[\u200c\u200d])[\u200c\u200d]+"
)


def reveal(text: str) -> Iterator[Edit]:
    """Drops what cannot be seen, decodes what is hidden there, and puts emoji into words, in spaces."""
    alike, last = 0, ("", 0)
    for match in _HIDDEN.finditer(text):
        kind, found = match.lastgroup, match.group()
        if kind == "flags":
            new = _flags(found)
        elif kind == "emoji":
            alike = alike + 1 if (found, match.start()) == last else 1
            last = (found, match.end())
            new = _emojis(found) if alike <= _MOST_ALIKE else ""
        elif kind == "tags":
            new = _tagged(found)
        elif kind == "selectors":
            new = _hidden(_clearest(_selected(found)))
        elif kind == "bits":
            new = _hidden(_clearest(_bits(found)) if len(found) <= _MOST_BITS else "")
        else:
            new = ""
        if new != found:
            yield match.start(), match.end(), new


def may_hide_message(text: str) -> bool:
    """Whether there are characters in which `reveal` finds messages: tags, variation selectors, operators."""
    return not text.isascii() and ("\u2064" in text or max(text) >= "\U000e0000")


_MOST_ALIKE = 3  # of the same emoji in a row: more say nothing more, and a name is a dozen times as long
_MOST_BITS = 8 * 4096  # int(..., 2) is linear, but a message this long is data


_TAGS_FROM, _TAGS_END = "\U000e0020", "\U000e007f"


def _tagged(found: str) -> str:
    return _hidden("".join(chr(ord(c) - 0xE0000) for c in found if _TAGS_FROM <= c < _TAGS_END))


def _hidden(message: str) -> str:
    """A hidden message in spaces, or as it is where it may be letters of a word."""
    return f" {message} " if len(message) > 2 else message


def _from_bytes(data: bytes) -> str:
    """UTF-8 text without control characters, or nothing."""
    try:
        message = data.decode("utf-8")
    except UnicodeDecodeError:
        return ""
    return message if message.isprintable() else ""


def _clearest(messages: Iterable[str]) -> str:
    """Of several ways to read a message the one with the most letters, the first of equals."""
    return max(messages, key=lambda message: sum(c.isalpha() or c == " " for c in message), default="")


def _selected(found: str) -> Iterator[str]:
    """Messages in variation selectors: by Butler's numbering of all 256, or ASCII in the supplement."""
    codes = [ord(c) for c in found]
    yield _from_bytes(bytes(code - 0xFE00 if code < 0xFE10 else code - 0xE0100 + 16 for code in codes))
    yield _from_bytes(bytes(code - 0xE0100 for code in codes if code >= 0xE0100))


def _bits(found: str) -> Iterator[str]:
    """Messages in invisible operators: of 8 bits a character, or of 7 with zero-width spaces for spaces."""
    words = ["".join("01"[c == "\u2064"] for c in word) for word in found.split("\u200b")]
    bits = "".join(words)
    size = len(bits) // 8
    yield _from_bytes(int(bits[: size * 8], 2).to_bytes(size)) if size else ""
    letters = ("".join(chr(int(word[i : i + 7], 2)) for i in range(0, len(word), 7)) for word in words)
    seven = " ".join(letters)
    yield seven if seven.isprintable() else ""


@cache
def _emoji_words() -> dict[str, str]:
    """Emoji without skin tones and presentation selectors -> its CLDR short name in words."""
    from emoji import EMOJI_DATA  # 50 ms to import, and few texts need it

    names: dict[str, str] = {}
    for symbol, data in sorted(EMOJI_DATA.items(), key=lambda item: len(item[0])):
        name = re.sub(r"_(?:(?:light|medium-light|medium|medium-dark|dark)_skin_tone)", "", data["en"])
        words = re.sub(r"[_:()“”\"]+", " ", name).replace("’", "'").replace("&", "and")
        words = "".join(c for c in unicodedata.normalize("NFD", words) if c.isascii())
        names.setdefault(_bare(symbol), " ".join(words.split()))
    for code in range(0x1F3FB, 0x1F400):
        names[chr(code)] = ""
    return {symbol: words for symbol, words in names.items() if symbol}


def _bare(symbol: str) -> str:
    bare = re.sub(_AFTER, "", symbol)
    return bare or symbol.replace("\ufe0f", "")


def _emojis(found: str) -> str:
    if found[-1] == _TAGS_END and _bare(found) not in _emoji_words():  # no flag, so a message
        bare = "".join(c for c in found if not _TAGS_FROM <= c <= _TAGS_END)
        return _emojis(bare) + _tagged(found)
    if len(found) > 64:  # no emoji is this long: take it for single ones, and keep it out of the cache
        return "".join(_emoji(c) for c in found)
    return _emoji(found)


@lru_cache(maxsize=4096)
def _emoji(symbol: str) -> str:
    bare = _bare(symbol)
    if bare[0] in _look_alikes()[0]:
        return bare
    known = _emoji_words()
    if bare in known:
        return f" {known[bare]} " if known[bare] else ""
    parts = [
        f" {known[c]} " if known.get(c) else "" if c in known or c in "\u200d\u20e3" else c for c in bare
    ]
    return "".join(c for c in parts if not "\U000e0020" <= c <= "\U000e007f")


def _flags(letters: str) -> str:
    """Names of flags, or the letters where they do not all make flags, or several of them make a word."""
    known = _emoji_words()
    names = [known.get(letters[i : i + 2]) for i in range(0, len(letters), 2)]
    spelled = "".join(chr(ord(c) - 0x1F1E6 + ord("A")) for c in letters)
    if all(names) and (len(names) < 2 or spelled.lower() not in ranks()):  # "move" is Macau and Venezuela
        return "".join(f" {name} " for name in names)
    return spelled


_OTHER = re.compile(r"[^\x00-\x7f]+")
_GENERIC = re.compile("[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]")
_AS_THEY_ARE = re.compile("[\u0e33\u0eb3\u3131-\u3163\u3165-\u318e，：；？！（）]")
"""Thai and Lao vowels and Korean letters, which it would take apart, and the punctuation of Chinese."""


_LONGEST_FOLD = 6  # Arabic has one character that stands for 18; its words need no unfolding


@lru_cache(maxsize=8192)
def _fold(char: str) -> str:
    """The plain form of one character: compatibility mapping, then ASCII letters without their accents."""
    latin = _look_alikes()[0].get(char)
    if latin is not None:
        return latin
    if char == "\u00b4":
        return "'"
    if _AS_THEY_ARE.match(char):
        return char
    folded = unicodedata.normalize("NFKC", char)
    if folded[:1] == " " and folded != " ":  # a free-standing accent
        return char
    if len(folded) > _LONGEST_FOLD:
        return char
    apart = unicodedata.normalize("NFD", folded)
    if apart[:1].isascii() or apart[:1] in _look_alikes()[0]:
        folded = "".join(
            _look_alikes()[0].get(c, c) for c in apart if unicodedata.category(c) not in ("Mn", "Me")
        )
    return folded


@lru_cache(maxsize=8192)
def _is_mark(char: str) -> bool:
    return unicodedata.category(char) in ("Mn", "Me")


def fold(text: str) -> Iterator[Edit]:
    """Characters in their plain form; marks on ASCII letters and stray accents go.

    Accents on letters of other scripts and the marks of those scripts stay.
    """
    for match in _OTHER.finditer(text):
        start = match.start()
        base = text[start - 1] if start else " "
        for place, char in enumerate(match.group(), start):
            if _is_mark(char):
                if (base.isascii() and base.isalpha()) or (_GENERIC.match(char) and not base.isalpha()):
                    yield place, place + 1, ""
                continue
            folded = _fold(char)
            if folded != char:
                yield place, place + 1, folded
            base = folded[-1:] or base


@cache
def _look_alikes() -> tuple[dict[str, str], dict[str, str]]:
    """(letters of the Latin script, letters of others) -> the ASCII character that each looks like."""
    path = Path(__file__).parent.parent / "data" / "confusables.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    latin, other = (
        {c: plain for plain, chars in table[key].items() for c in chars} for key in ("latin", "other")
    )
    return latin, other


_WORD = re.compile(r"[\w\u0300-\u036f]+")


@lru_cache(maxsize=4096)
def _resembled(char: str) -> str | None:
    """The ASCII letter that a letter of another script looks like, with or without its accents."""
    other = _look_alikes()[1]
    return other.get(char) or other.get(unicodedata.normalize("NFD", char)[0])


def replace_look_alikes(text: str) -> Iterator[Edit]:
    """Replaces letters of other scripts that look Latin, in words that mix them with Latin letters.

    Words made wholly of them count too, in a Latin text that has no words of another script, or is mostly
    Latin.
    """
    if text.isascii() or not any(_resembled(c) for c in set(text) if not c.isascii()):
        return
    neutral: list[re.Match[str]] = []
    mixed: list[re.Match[str]] = []
    latin_text = other_text = 0
    for match in _WORD.finditer(text):
        word = match.group()
        if word.isascii():
            latin_text += len(word)
            continue
        latin = sum(c.isascii() and c.isalpha() for c in word)
        foreign = [c for c in word if not c.isascii() and c.isalpha()]
        strange = sum(_resembled(c) is None for c in foreign)
        if latin and (not strange or latin >= len(foreign)):
            latin_text += len(word)
            mixed.append(match)
        elif foreign and not strange and not latin:
            neutral.append(match)
        else:
            other_text += len(foreign)
    doubtful = sum(len(match.group()) for match in neutral)
    if latin_text and (not other_text or latin_text > other_text + doubtful):
        mixed += neutral
    for match in sorted(mixed, key=re.Match.start):
        yield from _replaced(match)


def _replaced(match: re.Match[str]) -> Iterator[Edit]:
    for place, char in enumerate(match.group(), match.start()):
        plain = None if char.isascii() else "" if _is_mark(char) else _resembled(char)
        if plain is not None:
            yield place, place + 1, plain
