"""Streamed text, held back until it was scored together with what follows it."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from safeguard import flow
from safeguard.driving import Step, adrive, drive
from safeguard.judging import Budget, Piece, read_texts, strongest
from safeguard.types import Action, Report, Verdict

log = logging.getLogger(__name__)

_LONGEST_WORD = 40  # characters; what is longer is no word, or of a script that has no spaces
_LAST_WORD = re.compile(r"(?<=\s)\S*\Z")
_SPACE = re.compile(r"\s")
_SENTENCE_END = re.compile(r"[.!?…。！？]['\")\]]*\s|\n")


def _end_of_words(text: str) -> int:
    """Where the last whole word ends: the beginning of a word may read as another ("ass", "assume")."""
    tail = _LAST_WORD.search(text, max(len(text) - _LONGEST_WORD, 0))
    return len(text) if tail is None else tail.start()


def _last_words(text: str, size: int) -> str:
    """The last `size` characters, without the end of a word that is cut by that ("grass")."""
    if len(text) <= size or not size:
        return text if size else ""
    cut = len(text) - size
    if text[cut - 1].isspace():
        return text[cut:]
    space = _SPACE.search(text, cut, cut + _LONGEST_WORD)
    return text[cut if space is None else space.start() :]


class HeldText:
    """One stream of text: takes pieces in, gives out what may be released. All its state is its own.

    withhold: released is only what was scored with at least `hold_chars` behind it. sentence: whole
    sentences, scored with all that came before in the context. shadow: released at once, judged at the end.
    The end is always judged on the whole text, so the last verdict is that of the unstreamed text.
    """

    def __init__(self, route: flow.Route) -> None:
        self._route = route
        self._rules = route.policy.stream
        self._budget = Budget(route.policy)
        self._text: list[str] = []
        self._context = ""
        self._held = ""
        self._new = 0
        self._length = 0
        self._unseen: list[Verdict] = []
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
            yield from self._refuse(f"a stream must give text, got {type(chunk).__name__}")
            return "" if self.stopped else self._release(len(self._held))
        self._length += len(chunk)
        if self._length > self._route.policy.max_chars:
            yield from self._refuse(f"the stream is longer than max_chars {self._route.policy.max_chars}")
            return "" if self.stopped else self._release(len(self._held)) + chunk
        self._text.append(chunk)
        if self._rules.mode == "shadow":
            return chunk
        self._held += chunk
        self._new += len(chunk)
        if self._new < self._rules.step_chars:
            return ""
        if not self._ready(len(self._held)):
            return ""
        end = _end_of_words(self._held)
        ready = self._ready(end)
        self._new = 0
        yield from self._judge(self._context + self._held[:end])
        return "" if self.stopped else self._release(ready)

    def finish(self, whole: str | None = None) -> Generator[Step, Any, str]:
        """Judge the whole text; returns the rest that may be released.

        whole: the text, where it is known better than by its chunks, as when tokens are decoded together.
        """
        if self.stopped:
            return ""
        text = "".join(self._text) if whole is None else whole
        yield from self._judge(text)
        return "" if self.stopped else self._release(len(self._held))

    def _ready(self, end: int) -> int:
        """How much of the held text has enough behind it, judged up to `end`."""
        if self._rules.mode == "sentence":
            ends = [m.end() for m in _SENTENCE_END.finditer(self._held, 0, end)]
            return ends[-1] if ends else 0
        return max(end - self._rules.hold_chars, 0)

    def _release(self, ready: int) -> str:
        out, self._held = self._held[:ready], self._held[ready:]
        size = self._rules.context_chars
        self._context = _last_words(self._context + out, size)
        return out

    def _judge(self, text: str) -> Generator[Step, Any, None]:
        pieces = yield from read_texts([("output", text, 0)], self._route.policy)
        (row,) = yield from self._route.outputs.judge(pieces, self._budget)
        # a clean verdict replaces the one before: what counts is the latest look, or what stopped the stream
        self.verdicts = [*self._unseen, *row]

    def _refuse(self, why: str) -> Generator[Step, Any, None]:
        """Book what no later look will see."""
        (row,) = yield from self._route.outputs.judge([Piece("output", (), 0, why)], self._budget)
        self._unseen = self.verdicts = row


class GuardedStream:
    """A guarded stream from prompt to end: its prompt's verdicts, its held text and its one report."""

    def __init__(self, guard: Any, route: flow.Route, ask: flow.Ask, item: flow.Item | None = None) -> None:
        self._guard, self._route, self._ask, self._item = guard, route, ask, item
        self._held = HeldText(route)

    def run(self, chunks: Iterable[str]) -> Generator[str, None, None]:
        """Yield what may be released; stops reading the source as soon as something is flagged."""
        try:
            for chunk in chunks:
                if text := drive(self._held.feed(chunk)):
                    yield text
                if self._held.stopped:
                    break
                if not isinstance(chunk, str):  # let through by policy, and logged
                    yield chunk
            else:
                if text := drive(self._held.finish()):
                    yield text
        except BaseException:  # left early by the reader, or the source failed: what was judged is reported
            self._guard.tell([self.report()])
            raise
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
                with self._reported():
                    close()
        if tail := self._settle():
            yield tail

    async def arun(self, chunks: AsyncIterable[str]) -> AsyncGenerator[str, None]:
        """`run` for an event loop."""
        try:
            async for chunk in chunks:
                if text := await adrive(self._held.feed(chunk)):
                    yield text
                if self._held.stopped:
                    break
                if not isinstance(chunk, str):
                    yield chunk
            else:
                if text := await adrive(self._held.finish()):
                    yield text
        except BaseException:
            self._guard.tell([self.report()])
            raise
        finally:
            close = getattr(chunks, "aclose", None)
            if close is not None:
                with self._reported():
                    await close()
        if tail := self._settle():
            yield tail

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """A source of a stopped stream that cannot be closed must not stand in the way of its report."""
        try:
            yield
        except Exception as exc:
            if not self._held.stopped:
                raise
            log.warning("source of a stopped stream was not closed: error=%s", type(exc).__name__)

    def _settle(self) -> str:
        report = self.report()
        placeholder = self._route.policy.placeholder_text if report.blocked else ""
        return str(self._guard.settle([report], placeholder))

    def report(self) -> Report:
        """The report on prompt and text; final once the stream has ended."""
        before: Sequence[Verdict] = self._item.verdicts if self._item is not None else ()
        action = strongest(self._held.verdicts)
        if not action.passes:
            action = Action.BLOCK  # what was released cannot be redacted or made again
        elif self._item is not None and self._item.refined:
            action = Action.REFINE
        elif self._item is not None:
            action = max(action, self._item.asked, key=lambda a: a.strength)
        texts = self._item.texts if self._item is not None else {}
        return flow.make_report(
            self._route,
            self._ask,
            texts,
            [*before, *self._held.verdicts],
            action,
            refined=self._item is not None and self._item.refined,
            ms=self._held.spent_ms,
        )
