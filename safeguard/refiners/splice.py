"""Edits a text at several places and mends the sentence around them: articles, links, punctuation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_TOKEN = re.compile(r"[^\W_]+(?:['’][^\W_]+)*|\s+|.", re.S)
_SOFT = frozenset(",;:-–—|/+_*")
_HARD = frozenset(".!?")
_QUOTES = frozenset("\"'`")
_OPEN, _CLOSE = frozenset("([{"), frozenset(")]}")
_ARTICLES = frozenset(
    ("a", "an", "the", "his", "her", "their", "its", "my", "your", "some", "very", "more", "lots", "two")
)
_LINKS = frozenset(("and", "or", "but", "&"))
# fmt: off
_PREPOSITIONS = frozenset((  # and the verbs that stand like one
    "of", "in", "on", "with", "by", "from", "for", "to", "at", "into", "onto", "over", "under",
    "wearing", "holding", "showing", "having", "full", "covered", "doing", "being", "is", "are",
    "was", "were", "while", "during", "without",
))
# fmt: on
_DANGLING = _ARTICLES | _LINKS | _PREPOSITIONS
_EMPTY = _DANGLING | frozenset(
    ("s", "it", "this", "that", "who", "which", "he", "she", "they", "i", "very", "as")
)


@dataclass(frozen=True, slots=True)
class Edit:
    """Characters start to end (exclusive) become `into`; "" cuts them, None leaves them."""

    start: int
    end: int
    into: str | None


def splice(text: str, edits: Sequence[Edit], *, no_article: frozenset[str] = frozenset()) -> str:
    """The text with the edits made; edits in order and apart. What lies away from them stays as it is.

    no_article: a replacement that ends in one of these words takes an "a" or "an" before it away.
    """
    out: list[str] = []
    mender = _Mender(out)
    place = 0
    article = False  # the next word decides between "a" and "an"
    edits = [edit for edit in edits if edit.into is not None]
    for edit in (*edits, None):
        for token in _TOKEN.findall(text[place : edit.start if edit else len(text)]):
            if article and token[0].isalnum():
                _fix_article(out, token)
                article = False
            mender.add(token)
        if edit is None:
            break
        place = edit.end
        if edit.into:
            new = _in_case(text[edit.start : edit.end], edit.into)
            mender.flush_before(new)
            if new.split()[-1].lower() in no_article:
                _drop_article(out)
            _fix_article(out, new)
            out.append(new)
            article = False
        else:
            mender.cut()
            article = True
    mender.finish()
    whole = "".join(out)
    if edits and edits[0].into == "" and text[:1].isupper() and whole[:1].islower():
        whole = whole[:1].upper() + whole[1:]
    return whole


def is_blank(text: str) -> bool:
    """Whether nothing is left that could be drawn: no word but articles, links and the like."""
    words = (word for word in re.findall(r"[^\W_]+", text.lower()) if not word.isdecimal())
    return all(word in _EMPTY for word in words)


class _Mender:
    """Writes tokens behind a cut so that they join what stands before it; amortised constant work each."""

    def __init__(self, out: list[str]) -> None:
        self._out = out
        self._cut = False
        self._gap = ""  # what the blanks around the cut come to: nothing, one blank or a line break
        self._weight = False  # inside "(word:1.3)" whose word was cut
        self._possessive = False  # after the apostrophe of "word's" whose word was cut

    def cut(self) -> None:
        self._cut = True

    def add(self, token: str) -> None:
        """Append a token of the original text."""
        if not self._cut:
            self._out.append(token)
        elif token.isspace():
            self._widen(token)
        elif not self._joins(token):
            self._close(token)

    def flush_before(self, token: str) -> None:
        """Make ready for a replacement, which is never dropped."""
        if self._cut:
            self._close(token, keep=False)

    def finish(self) -> None:
        """Drop what dangles at the end of the text."""
        if self._cut:
            self._pop_blanks()
            self._pop_dangling()
            while self._out and (self._out[-1] in _SOFT or self._out[-1].isspace()):
                self._out.pop()

    def _joins(self, token: str) -> bool:
        """Whether the token falls away with the cut; stays in the state of a cut then."""
        self._pop_blanks()
        tail = self._out[-1] if self._out else ""
        if self._weight and (token.isdecimal() or token == "."):
            return True
        if token == ":" and tail in _OPEN:
            self._weight = True
            return True
        if token in _CLOSE and tail in _OPEN:
            self._out.pop()
            self._weight = False
            return True
        if token == tail and token in _QUOTES:
            self._out.pop()
            return True
        if token in ("'", "’") or (self._possessive and token.lower() == "s"):
            self._possessive = not self._possessive
            return True
        if token in _SOFT or token in _HARD:
            self._pop_dangling()
            tail = self._out[-1] if self._out else ""
            return not tail or tail in _OPEN or (token in _SOFT and (tail in _SOFT or tail in _HARD))
        if token.lower() in _LINKS or token.lower() in _PREPOSITIONS:
            return self._joins_link(token.lower())
        return False

    def _joins_link(self, word: str) -> bool:
        while self._out and (self._out[-1].lower() in _ARTICLES or self._out[-1].isspace()):
            self._widen(self._out.pop())
        tail = self._out[-1].lower() if self._out else ""
        if not tail or tail in _OPEN or tail in _SOFT or tail in _HARD:
            return word in _LINKS or not tail or word == "of"
        if word in _LINKS:
            return tail in _LINKS or tail in _PREPOSITIONS
        if tail in _PREPOSITIONS or tail in _LINKS:
            if word == "of":
                return True
            if tail in _PREPOSITIONS:
                self._out.pop()
        return False

    def _close(self, token: str, *, keep: bool = True) -> None:
        """End the state of a cut before `token`, with one blank or line break where there was any."""
        self._pop_blanks()
        if token in _HARD:
            while self._out and self._out[-1] in _SOFT:
                self._out.pop()
        tight = token in _HARD or token in _CLOSE or token in ",;:" or not self._out or self._out[-1] in _OPEN
        if self._gap and not tight:
            self._out.append(self._gap)
        if keep:
            self._out.append(token)
        self._cut, self._gap, self._weight, self._possessive = False, "", False, False

    def _widen(self, token: str) -> None:
        if "\n" in token:
            self._gap = "\n"
        elif token.isspace() and not self._gap:
            self._gap = " "

    def _pop_blanks(self) -> None:
        while self._out and self._out[-1].isspace():
            self._widen(self._out.pop())

    def _pop_dangling(self) -> None:
        while self._out and (self._out[-1].lower() in _DANGLING or self._out[-1].isspace()):
            self._out.pop()


def _in_case(old: str, new: str) -> str:
    """The replacement in capitals where the original was, with a capital where it began with one."""
    letters = [c for c in old if c.isalpha()]
    if len(letters) > 1 and all(c.isupper() for c in letters):
        return new.upper()
    return new[:1].upper() + new[1:] if letters and letters[0].isupper() else new


def _article_place(out: Sequence[str]) -> int | None:
    """Where "a" or "an" stands directly before what comes next."""
    if len(out) > 1 and out[-1].isspace() and out[-2].lower() in ("a", "an"):
        return len(out) - 2
    return None


def _fix_article(out: list[str], word: str) -> None:
    place = _article_place(out)
    if place is None:
        return
    right = "an" if word[:1].lower() in "aeiou" else "a"
    if out[place].lower() != right:
        out[place] = right.capitalize() if out[place][:1].isupper() else right


def _drop_article(out: list[str]) -> None:
    if _article_place(out) is not None:
        del out[-2:]
