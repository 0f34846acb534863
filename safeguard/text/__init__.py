"""The one place where text is made plain before it is judged, and cut where it is too long for a model.

`normalise` undoes disguises and keeps exact offsets into the original. It loses things that an honest text
may need (accents, digits inside words), so checks see the text as it stands as well, and the worse reading
counts. `views` adds what is written in codes and what control characters move about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from safeguard.text.ciphers import decipher, may_be_cipher, read_alphabet
from safeguard.text.encoded import READERS, may_be_encoded
from safeguard.text.letters import is_suspect, join_spaced, shorten_repeats, undo_leetspeak
from safeguard.text.shown import is_moved, take_back, turn_round
from safeguard.text.symbols import fold, may_hide_message, replace_look_alikes, reveal
from safeguard.text.view import Edit, View, apply, only_hidden, raw_view

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
_LEAST_HIDDEN = 12  # characters of a message that is scored alone
_DEEPEST = 3  # codes inside codes: more than that, and a model cannot read it either


def normalise(text: str) -> View:
    """The text without its disguises: the reading that models and word lists are given beside the raw one.

    Undone are compatibility forms (fullwidth, mathematical letters), accents on Latin letters, letters of
    other scripts that pose as Latin, invisible characters (what they hide is decoded), letter spacing,
    leetspeak and drawn out letters; emoji become their CLDR names in words. Case stays, and so does text in
    other scripts. Linear in the length; a plain ASCII text costs a few scans of its bytes.
    """
    view = raw_view(text, "normalised")
    return view if text.isascii() and not is_suspect(text) else _undisguised(view)


def views(text: str) -> tuple[View, ...]:
    """The readings of a text that are scored, at most five, each only where it differs from those before.

    raw: as it stands. normalised: without disguises. shown: with right-to-left overrides and backspaces
    obeyed. decoded: with what is written in codes (base64, hex, rot13, URL escapes, HTML entities ...) in
    clear, codes inside codes too, up to three deep; the span of what was decoded is that of its code. hidden:
    what was decoded, or invisible, alone, so that harmless words around it do not outweigh it.
    """
    raw = raw_view(text)
    plain = normalise(text)
    found = {view.text: view for view in (plain, raw)}
    if plain.text != text and is_moved(text):
        view = apply(raw_view(text, "shown"), take_back(text))
        view = _undisguised(apply(view, turn_round(view.text), whole=True))
        found.setdefault(view.text, view)
    hidden = _decoded(text, plain)
    if hidden is not None:
        found.setdefault(hidden.text, hidden)
    if hidden is not None or may_hide_message(text):
        alone = only_hidden(hidden or plain, _LEAST_HIDDEN)
        if alone is not None:
            found.setdefault(alone.text, alone)
    return (raw, *(view for view in found.values() if view is not raw))


def _undisguised(view: View) -> View:
    for _ in range(_MOST_PASSES):
        before = view.text
        for stage in STAGES:
            view = apply(view, stage(view.text))
        if view.text == before:
            break
    return view


def _decoded(text: str, plain: View) -> View | None:
    """The text with its codes in clear and without disguises, None where there are no codes."""
    view = start = raw_view(text, "decoded")
    if plain.text != text and not text.isascii():  # look-alikes within a code, but its digits as they are
        for stage in (reveal, fold, replace_look_alikes):
            view = start = apply(view, stage(view.text))
    view = _deciphered(view)
    if view is start and plain.text != view.text:  # a code under a disguise: "x v y y"
        view = start = View("decoded", plain.text, plain.starts, plain.ends)
        view = _deciphered(view)
    if view is start:
        return None
    view = _undisguised(view)
    inner = _deciphered(view)
    return view if inner is view else _undisguised(inner)


def _deciphered(view: View) -> View:
    """The view with its codes in clear, the same object where there are none."""
    for _ in range(_DEEPEST):
        before = view
        if may_be_encoded(view.text):
            for reader in READERS:
                view = apply(view, reader(view.text), whole=True)
        if may_be_cipher(view.text):
            for reader in (decipher, read_alphabet):
                view = apply(view, reader(view.text), whole=True)
        if view is before:
            break
    return view


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
