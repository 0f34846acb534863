"""Streamed text, held back until it was scored together with what follows it."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Sequence
from typing import Any, cast

from safeguard import flow
from safeguard.driving import Step, adrive, drive
from safeguard.judging import Budget, Piece, strongest, text_piece
from safeguard.types import Action, Report, Verdict

_SENTENCE_END = re.compile(r"[.!?…。！？]['\")\]]*\s|\n")


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
        """Take one chunk; returns the text that may be released now, maybe none."""
        if self.stopped:
            return ""
        if not isinstance(chunk, str):
            why = f"a stream must give text, got {type(chunk).__name__}"
            yield from self._judge(Piece("output", (), 0, why))
            return "" if self.stopped else cast(str, chunk)  # monitored: handed on unseen, and logged
        self._length += len(chunk)
        if self._length > self._route.policy.max_chars:
            why = f"the stream is longer than max_chars {self._route.policy.max_chars}"
            yield from self._judge(Piece("output", (), 0, why))
            return "" if self.stopped else chunk
        self._text.append(chunk)
        if self._rules.mode == "shadow":
            return chunk
        self._held += chunk
        self._new += len(chunk)
        ready = self._ready()
        if self._new < self._rules.step_chars or not ready:
            return ""
        self._new = 0
        yield from self._judge(text_piece("output", self._context + self._held, self._route.policy))
        return "" if self.stopped else self._release(ready)

    def finish(self, whole: str | None = None) -> Generator[Step, Any, str]:
        """Judge the whole text; returns the rest that may be released.

        whole: the text, where it is known better than by its chunks, as when tokens are decoded together.
        """
        if self.stopped:
            return ""
        text = "".join(self._text) if whole is None else whole
        yield from self._judge(text_piece("output", text, self._route.policy))
        return "" if self.stopped else self._release(len(self._held))

    def _ready(self) -> int:
        """How much of the held text has enough behind it."""
        if self._rules.mode == "sentence":
            ends = [m.end() for m in _SENTENCE_END.finditer(self._held)]
            return ends[-1] if ends else 0
        return max(len(self._held) - self._rules.hold_chars, 0)

    def _release(self, ready: int) -> str:
        out, self._held = self._held[:ready], self._held[ready:]
        size = self._rules.context_chars
        self._context = (self._context + out)[-size:] if size else ""
        return out

    def _judge(self, piece: Piece) -> Generator[Step, Any, None]:
        (row,) = yield from self._route.outputs.judge([piece], self._budget)
        # a clean verdict replaces the one before: what counts is the latest look, or what stopped the stream
        self.verdicts = row


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
            else:
                if text := drive(self._held.finish()):
                    yield text
        except BaseException:  # left early by the reader, or the source failed: what was judged is reported
            self._guard.tell([self.report()])
            raise
        finally:
            close = getattr(chunks, "close", None)
            if close is not None:
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
            else:
                if text := await adrive(self._held.finish()):
                    yield text
        except BaseException:
            self._guard.tell([self.report()])
            raise
        finally:
            close = getattr(chunks, "aclose", None)
            if close is not None:
                await close()
        if tail := self._settle():
            yield tail

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
