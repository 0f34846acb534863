"""The refiner where no trained one is installed: harmful words cut or softened from a data file.

It is named for what it is. It understands nothing: a prompt that is unsafe as a whole, without an unsafe
word, comes back unchanged, is judged again and blocked. It takes well under a millisecond and needs no model.
"""

from __future__ import annotations

import json
import logging
import re
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from safeguard.refiners.splice import Edit, is_blank, splice
from safeguard.text import views
from safeguard.types import RefineRequest, Span

log = logging.getLogger(__name__)

_WORD = re.compile(r"[^\W_]+")
_SPAN_WORDS, _SPAN_CHARS = 4, 48
"""A flagged span of at most so many words and characters is a place; a longer one is a scored window."""


@dataclass(frozen=True, slots=True)
class Softenings:
    """The data file, ready for use: `counterparts` maps a phrase, as its words; None leaves it as it is."""

    counterparts: Mapping[tuple[str, ...], str | None]
    longest: int
    no_article: frozenset[str]
    empty_scene: str

    @classmethod
    def parse(cls, data: Mapping[str, Any]) -> Softenings:
        """From the form of `softener.json`. Raises ValueError naming an entry that cannot be used."""
        table: dict[tuple[str, ...], str | None] = {}
        for entries in data["categories"].values():
            for phrase, counterpart in entries.items():
                forms, into = phrase.split("/"), counterpart.split("/")
                if len(into) > 1 and len(forms) > len(into):
                    raise ValueError(
                        f"softener entry {phrase!r} has more forms than its counterpart {counterpart!r}"
                    )
                into = into if len(into) > 1 else into * len(forms)
                table.update({_key(form): soft for form, soft in zip(forms, into, strict=False)})
        table.update({_key(phrase): None for phrase in data.get("keep", ())})
        longest = max(map(len, table), default=0)
        return cls(table, longest, frozenset(data.get("no_article", ())), data["empty_scene"])


@cache
def _packaged() -> Softenings:
    file = resources.files("safeguard") / "data" / "softener.json"
    return Softenings.parse(json.loads(file.read_text(encoding="utf-8")))


class SpanSoftener:
    """Replaces the words of a data file by milder ones or cuts them, and cuts short flagged spans.

    Works on the normalised text, so that disguised words are found, and edits the original; a text without a
    match comes back byte for byte. Linear in the length of the text.

    empty_scene: what stands for a prompt of which no word is left; True takes the neutral scene of the data
    file. None, the default, returns such a prompt unchanged, so that the flow blocks it: nothing of the
    intent could be kept.
    """

    name = "span-softener"

    def __init__(
        self, softenings: Softenings | None = None, *, empty_scene: str | bool | None = None
    ) -> None:
        self._softenings = softenings if softenings is not None else _packaged()
        self._empty_scene = self._softenings.empty_scene if empty_scene is True else empty_scene or None

    def __call__(self, requests: Sequence[RefineRequest], /) -> list[str]:
        """One text per request; never an empty one unless the prompt was."""
        return [self._soften(request) for request in requests]

    def _soften(self, request: RefineRequest) -> str:
        prompt = request.prompt
        edits = self._edits(prompt, request.spans)
        if not edits:
            return prompt
        text = splice(prompt, edits, no_article=self._softenings.no_article)
        if not is_blank(text):
            return text
        log.info(
            "nothing left of a prompt: refiner=%s cuts=%d replaced=%s",
            self.name,
            len(edits),
            bool(self._empty_scene),
        )
        return self._empty_scene or prompt

    def _edits(self, prompt: str, spans: Sequence[Span]) -> list[Edit]:
        """What to change, in order and apart: entries of the data file, then flagged spans beside them."""
        found = sorted(
            {e for view in views(prompt) for e in self._entries(view)}, key=lambda e: (e.start, -e.end)
        )
        edits = list(_apart(found))
        changes = [e for e in edits if e.into is not None]
        cuts = sorted(_short(prompt, spans), key=lambda e: (e.start, -e.end))
        if not cuts:
            return changes
        starts = [edit.start for edit in changes]
        free = [cut for cut in _apart(cuts) if not _touches(cut, changes, starts)]
        return sorted(changes + free, key=lambda e: e.start)

    def _entries(self, view: Any) -> Iterator[Edit]:
        """The longest entry at each word of a view, left to right, as edits of the original text."""
        words = [(m.group().lower(), m.start(), m.end()) for m in _WORD.finditer(view.text)]
        table, place = self._softenings.counterparts, 0
        while place < len(words):
            size = self._match(view.text, words, place)
            if size:
                first, last = words[place], words[place + size - 1]
                into = table[tuple(word for word, _, _ in words[place : place + size])]
                start, end = view.span(first[1], last[2])
                yield Edit(start, end, into)
            place += size or 1

    def _match(self, text: str, words: Sequence[tuple[str, int, int]], place: int) -> int:
        """Words of the longest entry that begins here, 0 for none; only blanks and dashes may part them."""
        reach = 1
        while reach < self._softenings.longest and place + reach < len(words):
            gap = text[words[place + reach - 1][2] : words[place + reach][1]]
            if len(gap) > 3 or gap.strip(" \t\n-–_/'’*"):
                break
            reach += 1
        key = tuple(word for word, _, _ in words[place : place + reach])
        return next((n for n in range(reach, 0, -1) if key[:n] in self._softenings.counterparts), 0)


def _key(phrase: str) -> tuple[str, ...]:
    words = tuple(_WORD.findall(phrase.lower()))
    if not words:
        raise ValueError(f"softener entry without a word: {phrase!r}")
    return words


def _apart(edits: Sequence[Edit]) -> Iterator[Edit]:
    """Of sorted edits those that do not overlap an earlier one."""
    end = 0
    for edit in edits:
        if edit.start >= end:
            yield edit
            end = edit.end


def _touches(cut: Edit, edits: Sequence[Edit], starts: Sequence[int]) -> bool:
    """Whether a cut overlaps one of the edits, which are in order and apart."""
    last = bisect_left(starts, cut.end) - 1
    return last >= 0 and edits[last].end > cut.start


def _short(prompt: str, spans: Sequence[Span]) -> Iterator[Edit]:
    """Cuts of the spans that name a place, widened to whole words."""
    for span in spans:
        start, end = max(span.start, 0), min(span.end, len(prompt))
        if start >= end or end - start > _SPAN_CHARS or len(prompt[start:end].split()) > _SPAN_WORDS:
            continue
        least, most = start - _SPAN_CHARS, end + _SPAN_CHARS  # a megabyte without a blank is no word
        while start > max(least, 0) and prompt[start].isalnum() and prompt[start - 1].isalnum():
            start -= 1
        while end < min(most, len(prompt)) and prompt[end - 1].isalnum() and prompt[end].isalnum():
            end += 1
        yield Edit(start, end, "")
