"""The one place where text is made plain before it is judged, and cut where it is too long for a model.

`normalise` undoes disguises and keeps exact offsets into the original. It loses things that an honest text
may need (accents, digits inside words), so checks see the text as it stands as well, and the worse reading
counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from safeguard.text.letters import is_suspect, join_spaced, shorten_repeats, undo_leetspeak
from safeguard.text.symbols import fold, replace_look_alikes, reveal
from safeguard.text.view import Edit, View, apply, raw_view

__all__ = ["View", "normalise", "views", "windows"]

STAGES: tuple[Callable[[str], Iterable[Edit]], ...] = (
    reveal,
    fold,
    replace_look_alikes,
    join_spaced,
    undo_leetspeak,
    shorten_repeats,
)
"""In this order: each undoes what would hide the next one's signs."""

_MOST_PASSES = 4  # disguises inside disguises


def normalise(text: str) -> View:
    """The text without its disguises: the reading that models and word lists are given beside the raw one.

    Undone are compatibility forms (fullwidth, mathematical letters), accents on Latin letters, letters of
    other scripts that pose as Latin, invisible characters (what they hide is decoded), letter spacing,
    leetspeak and drawn out letters; emoji become their CLDR names in words. Case stays, and so does text in
    other scripts. Linear in the length; a plain ASCII text costs a few scans of its bytes.
    """
    view = raw_view(text, "normalised")
    if text.isascii() and not is_suspect(text):
        return view
    for _ in range(_MOST_PASSES):
        before = view.text
        for stage in STAGES:
            view = apply(view, stage(view.text))
        if view.text == before:
            break
    return view


def views(text: str) -> tuple[View, ...]:
    """The readings of a text that are scored: as it stands, and normalised where that makes a difference."""
    raw = raw_view(text)
    if text.isascii() and not is_suspect(text):
        return (raw,)
    plain = normalise(text)
    return (raw,) if plain.text == text else (raw, plain)


def windows(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    """Windows [start, end) of `size` that cover 0 to `length`, each sharing `overlap` or more with the last.

    One window of the whole length where it fits; otherwise all are full, the last one ends at `length`.
    Raises ValueError for a negative length or overlap, or a size that is not above the overlap.
    """
    if length < 0 or overlap < 0 or size <= overlap:
        raise ValueError(f"windows need length >= 0 and size > overlap >= 0, got {length}, {size}, {overlap}")
    if length <= size:
        return [(0, length)]
    starts = [*range(0, length - size, size - overlap), length - size]
    return [(start, start + size) for start in starts]
