"""Words and phrases that are never wanted, found in one pass however many (Aho and Corasick 1975)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import ahocorasick

from safeguard.text import View, views
from safeguard.text.symbols import fold
from safeguard.text.view import apply, raw_view
from safeguard.types import Finding, Modality, Span

_MOST_BYTES = 16 * 2**20
_MOST_CHARS = 1000  # of one entry
_SPACES = re.compile(r"[^\S ]\s*| \s+")  # all but a single space
_UNSPACED = re.compile(  # scripts that do not part words by spaces: Thai to Burmese, Khmer, kana, ideographs
    "[\u0e00-\u109f\u1780-\u17ff\u3005-\u312f\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)


class Blocklist:
    """Scores 1 for each category of which an entry stands in the text, else 0; spans say where.

    Entries match whole words without regard to case, in all readings of a text (see `safeguard.text.views`):
    as it stands, without disguises, decoded. A space in an entry matches any white space. At an end where an
    entry has a letter of a script without spaces between words (Chinese, Japanese, Thai ...) there need be
    no border.
    """

    modality: Modality = "text"

    def __init__(
        self, words: Mapping[str, Iterable[str]] | Iterable[str], *, name: str = "blocklist"
    ) -> None:
        """words: category -> entries, or entries alone for the category "blocklist".

        Raises TypeError for entries that are no strings or one string in their place, ValueError where
        there is nothing to look for.
        """
        self.name = name
        lists = words if isinstance(words, Mapping) else {"blocklist": words}
        found: dict[str, set[str]] = {}
        for category, entries in lists.items():
            for entry in _entries(entries):
                for form in {_plain(raw_view(entry)), _plain(apply(raw_view(entry), fold(entry)))} - {""}:
                    found.setdefault(form, set()).add(category)
        if not found:
            raise ValueError("a blocklist needs at least one word, got none")
        self.labels = tuple(lists)
        self.digest = sha256(repr(sorted((f, sorted(c)) for f, c in found.items())).encode()).hexdigest()
        self._automaton: Any = ahocorasick.Automaton()
        for form, categories in found.items():
            self._automaton.add_word(form, (len(form), tuple(sorted(categories))))
        self._automaton.make_automaton()

    @classmethod
    def load(cls, path: str | Path) -> Blocklist:
        """From a UTF-8 text file, one entry a line, `#` for comments; the category is the name of the file.

        Raises ValueError, naming the line, for what is no text, and for a file that is too large or empty;
        FileNotFoundError where there is none.
        """
        path = Path(path)
        entries = read_entries(path)
        if not entries:
            raise ValueError(f"{path.name} has no entries; write one word or phrase on each line")
        return cls({path.stem: entries}, name=f"blocklist/{path.stem}")

    def __call__(self, batch: Sequence[str], /) -> list[Finding]:
        """One finding per text, with scores for every category. TypeError for what is no text."""
        for i, text in enumerate(batch):
            if not isinstance(text, str):
                raise TypeError(f"item {i} of the batch must be text, got {type(text).__name__}")
        return [self._find(text) for text in batch]

    def _find(self, text: str) -> Finding:
        hits = {hit for view in views(text) for hit in self._hits(view)}
        flagged = {category for _, _, category in hits}
        spans = tuple(Span(start, end, category) for start, end, category in sorted(hits))
        scores = {category: float(category in flagged) for category in self.labels}
        return Finding(scores, spans)

    def _hits(self, view: View) -> Iterable[tuple[int, int, str]]:
        folded = _folded(view)
        text = folded.text
        for last, (length, categories) in self._automaton.iter(text):
            start, end = last + 1 - length, last + 1
            if _is_border(text, start) and _is_border(text, end):
                for category in categories:
                    yield (*folded.span(start, end), category)


def _entries(entries: Any) -> list[str]:
    if isinstance(entries, str | bytes) or not isinstance(entries, Iterable):
        raise TypeError(f"words must be a collection of strings, got {type(entries).__name__}")
    listed = list(entries)
    for entry in listed:
        if not isinstance(entry, str):
            raise TypeError(f"a blocklist entry must be a string, got {type(entry).__name__}")
    return listed


def _plain(entry: View) -> str:
    """An entry in the form in which it is looked for."""
    return _folded(entry).text.strip()


def _folded(view: View) -> View:
    """The view in lower case, each letter composed, with one space for each run of white space."""
    text = view.text
    if text.isascii():
        lower = text.lower()  # as long as before, so the offsets hold
        view = View(view.name, lower, view.starts, view.ends)
    else:
        edits = ((i, i + 1, folded) for i, c in enumerate(text) if (folded := _fold_char(c)) != c)
        view = apply(view, edits)
    return apply(view, ((m.start(), m.end(), " ") for m in _SPACES.finditer(view.text)))


def _fold_char(char: str) -> str:
    return unicodedata.normalize("NFC", char).casefold()


def _is_border(text: str, place: int) -> bool:
    """Whether a word may begin or end between the characters before and after `place`."""
    if place in (0, len(text)):
        return True
    before, after = text[place - 1], text[place]
    if not (_in_word(before) and _in_word(after)):
        return True
    return bool(_UNSPACED.match(before) or _UNSPACED.match(after))


def _in_word(char: str) -> bool:
    return char.isalnum() or char == "_" or unicodedata.category(char) in ("Mn", "Mc")


def read_entries(path: Path) -> list[str]:
    """Lines of a UTF-8 text file without blank ones and comments (`#`).

    Raises ValueError, naming the line, for what is no text, and for a file that is too large.
    """
    size = path.stat().st_size
    if size > _MOST_BYTES:
        raise ValueError(
            f"{path.name} has {size} bytes, more than the {_MOST_BYTES} that a blocklist may have"
        )
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            entry = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as exc:
            raise ValueError(f"{path.name} line {number} is not UTF-8: {exc.reason}") from exc
        if "\0" in entry:
            raise ValueError(f"{path.name} line {number} has a NUL character; a blocklist is plain text")
        if len(entry) > _MOST_CHARS:
            raise ValueError(
                f"{path.name} line {number} has {len(entry)} characters; an entry may have {_MOST_CHARS}"
            )
        if entry and not entry.startswith("#"):
            entries.append(entry)
    return entries
