"""Patterns of the user (regular expressions), found in time linear in the text whatever they are.

They run in RE2 (google-re2), which has no backtracking, and in nothing else: Python's `re` would hang on a
pattern such as `(a+)+$` and cannot be stopped. What RE2 cannot do (look-around, back-references) is refused
when the patterns are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from safeguard.checks.blocklist import read_entries
from safeguard.errors import MissingExtra
from safeguard.text import View, views
from safeguard.types import Finding, Modality, Span

_MOST_PATTERNS = 1000
_MOST_MATCHES = 64  # of one pattern in one reading; each may cost a look at the whole rest of the text
_MOST_BYTES = 2**20  # of memory for one compiled pattern: (a{1,100}){1,100} is refused, not compiled


class Patterns:
    """Scores 1 for each category of which a pattern matches in some reading of the text, else 0.

    Case does not count, unless a pattern begins with `(?-i)`. All readings are searched (see
    `safeguard.text.views`). A pattern that matches the empty text is refused: it would match everywhere.
    """

    modality: Modality = "text"

    def __init__(
        self, patterns: Mapping[str, Iterable[str]] | Iterable[str], *, name: str = "patterns"
    ) -> None:
        """patterns: category -> patterns, or patterns alone for the category "patterns".

        Raises MissingExtra without google-re2, TypeError for what are no strings, ValueError for a pattern
        that RE2 refuses, naming its number and not what it says.
        """
        self.name = name
        if isinstance(patterns, str | bytes):
            raise TypeError(f"patterns must be a collection of strings, got {type(patterns).__name__}")
        lists = patterns if isinstance(patterns, Mapping) else {"patterns": patterns}
        listed = {category: list(found) for category, found in lists.items()}
        count = sum(map(len, listed.values()))
        if not 0 < count <= _MOST_PATTERNS:
            raise ValueError(f"there must be 1 to {_MOST_PATTERNS} patterns, got {count}")
        self.labels = tuple(listed)
        self.digest = sha256(repr(sorted(listed.items())).encode("utf-8", "replace")).hexdigest()
        self._compiled = [
            (_compiled(pattern, f"pattern {number} of {category!r}"), category)
            for category, found in listed.items()
            for number, pattern in enumerate(found, 1)
        ]

    @classmethod
    def load(cls, path: str | Path) -> Patterns:
        """From a UTF-8 text file, a pattern a line, `#` for comments; the category is the file's name."""
        path = Path(path)
        entries = read_entries(path)
        if not entries:
            raise ValueError(f"{path.name} has no patterns; write one on each line")
        return cls({path.stem: entries}, name=f"patterns/{path.stem}")

    def __call__(self, batch: Sequence[str], /) -> list[Finding]:
        """One finding per text, with scores for every category."""
        return [self._find(text) for text in batch]

    def _find(self, text: str) -> Finding:
        hits = {hit for view in views(text) for hit in self._hits(view)}
        flagged = {category for _, _, category in hits}
        scores = {category: float(category in flagged) for category in self.labels}
        return Finding(scores, tuple(Span(start, end, category) for start, end, category in sorted(hits)))

    def _hits(self, view: View) -> Iterator[tuple[int, int, str]]:
        text = view.text.encode("utf-8", "replace").decode()  # a lone surrogate becomes "?", so offsets hold
        for pattern, category in self._compiled:
            for number, match in enumerate(pattern.finditer(text)):
                if number == _MOST_MATCHES:
                    break
                yield (*view.span(match.start(), match.end()), category)


def _compiled(pattern: Any, where: str) -> Any:
    try:
        import re2
    except ImportError as exc:
        raise MissingExtra("google-re2", "patterns") from exc
    if not isinstance(pattern, str):
        raise TypeError(f"{where} must be a string, got {type(pattern).__name__}")
    options = re2.Options()
    options.case_sensitive = False
    options.log_errors = False  # they would hold the pattern
    options.max_mem = _MOST_BYTES
    try:
        found = re2.compile(pattern, options)
        empty = found.search("") is not None
    except (re2.error, UnicodeEncodeError) as exc:
        reason = exc.args[0] if exc.args and not isinstance(exc, UnicodeEncodeError) else "no valid text"
        kind = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else str(reason)
        raise ValueError(f"{where} is refused by RE2: {kind.split(':')[0]}") from None
    if empty:
        raise ValueError(f"{where} matches the empty text, so it would match everywhere")
    return found
