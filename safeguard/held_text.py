"""Streamed text, held back until it was scored together with what follows it.

What `withhold` promises, with `hold` for `hold_chars` and `context` for `context_chars`, counted in every
reading of the text (as it stands, and without its disguises, where whitespace of any length counts as one):

* a character is released only after `hold` characters behind it were scored with it. So of a flagged place of
  at most `hold` characters nothing is ever released;
* of a longer place, up to `hold + context - 40`, at least the last `hold` characters stay back;
* what is flagged only as a longer place, or only as a whole, is found when the whole text is judged at the
  end: the stream then ends blocked, with `hold` characters or more withheld, and the rest is out. Where that
  must not be, raise `hold_chars`, or do not stream.

What is released and what is withheld make up the text. A text that is flagged when it is judged at once is
flagged as a stream; the reverse holds for checks that look for places, while one that scores whole texts may
flag a part of a text that it would pass as a whole: then the stream is stopped there.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from typing import Any

from safeguard import calls
from safeguard.driving import Step
from safeguard.judging import Budget, Piece, read_texts, strongest
from safeguard.text import View
from safeguard.types import Verdict

_LONGEST_WORD = 40  # characters; what is longer is no word, or of a script that has no spaces
_LAST_WORD = re.compile(r"(?<=\s)(?:\S[^\w\s]{0,2}\s){0,19}\S*\Z")  # letters set apart are one word
_LAST_LETTERS = re.compile(r"\w+\Z")
_FIRST_SPACE = re.compile(r"\s(?!\S[^\w\s]{0,2}\s)")
_FIRST_SIGN = re.compile(r"\W(?!\w\W)")
_UNIT = re.compile(r"\s+|\S")
_SENTENCE_END = re.compile(r"""[.!?…]['")\]”’»]*\s|[。！？｡]['")\]”’」』）]*|\n""")
_LONGEST_END = 8  # characters of a sentence's end that may lie in the chunk before


def _end_of_words(text: str) -> int:
    """Where the last whole word ends: the beginning of a word may read as another ("ass", "assume")."""
    near = max(len(text) - _LONGEST_WORD, 0)
    tail = _LAST_WORD.search(text, near)
    if tail is None and near:  # no space for long: at least no letters are parted
        tail = _LAST_LETTERS.search(text, near)
        tail = None if tail is None or tail.start() == near else tail
    return len(text) if tail is None else tail.start()


def _last_words(text: str, size: int) -> str:
    """The last `size` characters, without the end of a word that is cut by that ("grass")."""
    if len(text) <= size or not size:
        return text if size else ""
    cut = len(text) - size
    found = _FIRST_SPACE.search(text, cut - 1, cut + _LONGEST_WORD)
    found = found or _FIRST_SIGN.search(text, cut - 1, cut + _LONGEST_WORD)
    return text[cut if found is None else found.start() :]


def _room(view: View, count: int) -> int:
    """Where in the original the last `count` characters of a reading begin; a run of spaces counts as one."""
    text = view.text
    tight = [m.start() for m in _UNIT.finditer(text)]
    return view.starts[tight[-count]] if len(tight) > count else 0


class HeldText:
    """One stream of text: takes pieces in, gives out what may be released. All its state is its own.

    withhold: released is only what was scored with at least `hold_chars` behind it. sentence: whole
    sentences, scored with all that came before in the context. shadow: released at once, judged at the end.
    The end is always judged on the whole text, so the last verdict is that of the unstreamed text.

    budget: time for all checks, shared with other texts of the same call. source: name in reports.
    """

    def __init__(self, route: calls.Route, budget: Budget | None = None, source: str = "output") -> None:
        self._route, self._source = route, source
        self._rules = route.policy.stream
        self._budget = budget or Budget(route.policy)
        self._text: list[str] = []
        self._context = ""
        self._held = ""
        self._fresh: list[str] = []  # of the held text what no look has seen
        self._new = self._length = 0
        self._edge, self._ended = "", False  # the last characters, and whether a sentence ended since a look
        self._looked = 0  # how far into the held text was looked
        self._unseen: list[Verdict] = []
        self._kept: list[Verdict] = []  # of the first look at which something was let through by policy
        self.verdicts: list[Verdict] = []

    @property
    def stopped(self) -> bool:
        """Whether something was flagged or failed, so that nothing more may be released."""
        return not strongest(self.verdicts).passes

    @property
    def spent_ms(self) -> float:
        """Milliseconds of judging so far."""
        return self._budget.spent_ms

    def feed(self, chunk: Any) -> Generator[Step, Any, str]:
        """Take one chunk; returns the text that may be released now, maybe none.

        A chunk that is no text is not among it: where nothing is stopped, the caller hands it on after it.
        """
        if self.stopped or chunk == "":  # a source that waits may give nothing for long
            return ""
        if not isinstance(chunk, str):
            yield from self.refuse(f"a stream must give text, got {type(chunk).__name__}")
            return self._give_up()
        self._length += len(chunk)
        if self._length > self._route.policy.max_chars:
            yield from self.refuse(f"the stream is longer than max_chars {self._route.policy.max_chars}")
            return "" if self.stopped else self._give_up() + chunk
        self._text.append(chunk)
        if self._rules.mode == "shadow":
            return chunk
        self._fresh.append(chunk)
        self._new += len(chunk)
        if not self._is_due(chunk):
            return ""
        self._held += "".join(self._fresh)
        self._fresh.clear()
        self._new = 0
        if self._rules.mode == "withhold" and len(self._held) <= self._rules.hold_chars:
            return ""
        end = _end_of_words(self._held)
        if end <= self._looked:
            return ""
        self._looked = end
        views = yield from self._judge(self._context + self._held[:end])
        return "" if self.stopped else self._release(self._ready(end, views))

    def finish(self, whole: str | None = None) -> Generator[Step, Any, str]:
        """Judge the whole text; returns the rest that may be released.

        whole: the text, where it is known better than by its chunks, as when tokens are decoded together.
        """
        if self.stopped:
            return ""
        text = "".join(self._text) if whole is None else whole
        yield from self._judge(text)
        return "" if self.stopped else self._give_up()

    def refuse(self, why: str) -> Generator[Step, Any, None]:
        """Book what no look will see: it is an error, closed unless the policy says otherwise."""
        (row,) = yield from self._route.outputs.judge([Piece(self._source, (), 0, why)], self._budget)
        self._unseen = row
        self.verdicts = [*self._unseen, *self._kept]

    def _is_due(self, chunk: str) -> bool:
        """Whether enough is new for a look: in proportion to what would be looked at.

        So work stays linear whatever is held.
        """
        rules = self._rules
        usual = rules.context_chars + rules.hold_chars + 2 * rules.step_chars + 2 * _LONGEST_WORD
        window = len(self._context) + len(self._held) + self._new
        due = self._new * usual >= rules.step_chars * max(usual, window)
        if rules.mode == "sentence":
            self._ended = self._ended or _SENTENCE_END.search(self._edge + chunk) is not None
            self._edge = (self._edge + chunk)[-_LONGEST_END:]
            return due and self._ended
        return due

    def _ready(self, end: int, views: Sequence[View]) -> int:
        """How much of the held text has enough behind it, judged up to `end`."""
        if self._rules.mode == "sentence":
            ends = [m.end() for m in _SENTENCE_END.finditer(self._held, 0, end)]
            self._ended = _SENTENCE_END.search(self._held, ends[-1] if ends else 0) is not None
            return ends[-1] if ends else 0
        ready = end - self._rules.hold_chars
        places = [_room(view, self._rules.hold_chars) - len(self._context) for view in views]
        return max(min([ready, *places]), 0)

    def _give_up(self) -> str:
        """All that is held, where nothing stands against it."""
        if self.stopped:
            return ""
        self._held += "".join(self._fresh)
        self._fresh.clear()
        self._new = 0
        return self._release(len(self._held))

    def _release(self, ready: int) -> str:
        out, self._held = self._held[:ready], self._held[ready:]
        self._looked = max(self._looked - ready, 0)
        self._context = _last_words(self._context + out, self._rules.context_chars)
        return out

    def _judge(self, text: str) -> Generator[Step, Any, Sequence[View]]:
        (piece,) = yield from read_texts([(self._source, text, 0)], self._route.policy)
        (row,) = yield from self._route.outputs.judge([piece], self._budget)
        # a clean verdict replaces the one before: what counts is the latest look, or what stopped the stream
        self.verdicts = [*self._unseen, *self._kept, *row]
        if not self._kept and any(v.flagged or v.error for v in row):
            self._kept = row  # let through by policy: the report keeps the first time
        return piece.views
