"""What a text looks like where its control characters are obeyed: right-to-left overrides and backspaces.

An override shows "llik" as "kill", a backspace takes back the character before it. Programs differ in whether
they obey, so this is a reading beside the one without those characters (Boucher et al. 2022, Bad Characters).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from safeguard.text.view import Edit

_TAKEN_BACK = re.compile("[\x08\x7f]")
_OVERRIDE = "\u202e"
_OPEN = frozenset("\u202a\u202b\u202d\u202e\u2066\u2067\u2068")
_CLOSE = frozenset("\u202c\u2069")
_BREAK = frozenset("\n\r\u2029\x1c\x1d\x1e\x85")
_DEEPEST = 125  # Unicode Bidirectional Algorithm, max_depth


def is_moved(text: str) -> bool:
    """Whether there is anything to obey."""
    return _OVERRIDE in text or _TAKEN_BACK.search(text) is not None


def take_back(text: str) -> Iterator[Edit]:
    """Drops each backspace or delete with the character before it."""
    kept: list[int] = []
    gone: list[int] = []
    for place, char in enumerate(text):
        if char in "\x08\x7f":
            gone.append(place)
            if kept:
                gone.append(kept.pop())
        elif char in _BREAK:
            kept.clear()  # no line before this one is reached
        else:
            kept.append(place)
    for place in sorted(gone):
        yield place, place + 1, ""


def turn_round(text: str) -> Iterator[Edit]:
    """Puts what stands in a right-to-left override in the order in which it is shown.

    An override ends where it is closed or at the end of the line; what is embedded in it keeps its own order.
    """
    place = text.find(_OVERRIDE)
    while place >= 0:
        shown, end = _shown(text, place)
        yield place, end, shown
        place = text.find(_OVERRIDE, end)


def _shown(text: str, start: int) -> tuple[str, int]:
    """The text of the override at `start` as shown, and where it ends."""
    levels: list[tuple[str, list[str]]] = []
    for place in range(start, len(text)):
        char = text[place]
        if char in _BREAK:
            return _closed(levels), place
        if char in _OPEN and len(levels) < _DEEPEST:
            levels.append((char, []))
        elif char in _CLOSE:
            inner = _closed([levels.pop()])
            if not levels:
                return inner, place + 1
            levels[-1][1].append(inner)
        elif char not in _OPEN:
            levels[-1][1].append(char)
    return _closed(levels), len(text)


def _closed(levels: list[tuple[str, list[str]]]) -> str:
    """The text of nested levels, outermost first, all of which end here."""
    inner = ""
    for kind, parts in reversed(levels):
        parts = [*parts, inner] if inner else parts
        inner = "".join(reversed(parts) if kind == _OVERRIDE else parts)
    return inner
