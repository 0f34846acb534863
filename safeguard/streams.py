"""A guarded stream from its prompt to its end: what may be released, its reports, its source closed."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from inspect import isawaitable
from typing import Any

from safeguard import calls
from safeguard.chunks import Texts, read_chunk
from safeguard.driving import Step, adrive, drive
from safeguard.held_chunks import HeldChunks
from safeguard.held_text import HeldText
from safeguard.judging import strongest
from safeguard.types import Action, Report, Verdict

log = logging.getLogger(__name__)


class HeldStrings:
    """A stream of strings, held back as one text."""

    def __init__(self, route: calls.Route) -> None:
        self._held = HeldText(route)

    @property
    def stopped(self) -> bool:
        """Whether something was flagged or failed."""
        return self._held.stopped

    @property
    def spent_ms(self) -> float:
        """Milliseconds of judging so far."""
        return self._held.spent_ms

    @property
    def rows(self) -> list[list[Verdict]]:
        """The verdicts on the one text."""
        return [self._held.verdicts]

    def feed(self, chunk: Any) -> Generator[Step, Any, list[Any]]:
        """What may be released after this chunk; the chunk itself where it is no text and let through."""
        text = yield from self._held.feed(chunk)
        rest = [] if self.stopped or isinstance(chunk, str) else [chunk]
        return [text, *rest] if text else rest

    def finish(self) -> Generator[Step, Any, list[Any]]:
        """Judge the whole; what may be released then."""
        text = yield from self._held.finish()
        return [text] if text else []

    def placeholder(self, text: str) -> Any:
        """What ends a blocked stream, None for nothing."""
        return text or None


class GuardedStream:
    """One stream: its prompt's verdicts, its held texts and their reports. All its state is its own.

    A source of strings is one text; one of chunk objects has a text per choice (see `safeguard.chunks`). The
    first chunk says which. read: how the text is taken out of other objects.

    The source is closed (`close` or `aclose`, of the iterator and of the object that gave it) as soon as
    something is flagged, the reader leaves, or it ends: a generator then stops generating.
    """

    def __init__(
        self,
        guard: Any,
        route: calls.Route,
        ask: calls.Ask,
        item: calls.Item | None = None,
        read: Callable[[Any], Texts] | None = None,
    ) -> None:
        self._guard, self._route, self._ask, self._item = guard, route, ask, item
        self._read = read
        self._held: HeldStrings | HeldChunks | None = None if read is None else HeldChunks(route, read)

    def run(self, chunks: Iterable[Any]) -> Generator[Any, None, None]:
        """Yield what may be released; stops reading the source as soon as something is flagged."""
        source: Any = None
        try:
            source = iter(chunks)
            for chunk in source:
                held = self._holder(chunk)
                for out in drive(held.feed(chunk)):
                    yield out
                if held.stopped:
                    break
            else:
                for out in drive(self._holder("").finish()):
                    yield out
        except BaseException:  # left early by the reader, or the source failed: what was judged is reported
            self._guard.tell_unfinished(self.reports())
            raise
        finally:
            with self._reported(), ExitStack() as closing:
                for part in _sources(source, chunks):
                    closing.callback(_close, part)
        for out in self._settle():
            yield out

    async def arun(self, chunks: AsyncIterable[Any]) -> AsyncGenerator[Any, None]:
        """`run` for an event loop."""
        source: Any = None
        try:
            source = aiter(chunks)
            async for chunk in source:
                held = self._holder(chunk)
                for out in await adrive(held.feed(chunk)):
                    yield out
                if held.stopped:
                    break
            else:
                for out in await adrive(self._holder("").finish()):
                    yield out
        except BaseException:
            self._guard.tell_unfinished(self.reports())
            raise
        finally:
            with self._reported():
                async with AsyncExitStack() as closing:
                    for part in _sources(source, chunks):
                        closing.push_async_callback(_aclose, part)
        for out in self._settle():
            yield out

    def _holder(self, chunk: Any) -> HeldStrings | HeldChunks:
        """What holds this stream back; made for the kind of its first chunk."""
        if self._held is None:
            strings = isinstance(chunk, str | bytes | bytearray) or not _has_choices(chunk)
            self._held = HeldStrings(self._route) if strings else HeldChunks(self._route, read_chunk)
        return self._held

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """A source of a stopped stream that cannot be closed must not stand in the way of its report."""
        try:
            yield
        except Exception as exc:
            if self._held is None or not self._held.stopped:
                raise
            log.warning("source of a stopped stream was not closed: error=%s", type(exc).__name__)

    def _settle(self) -> list[Any]:
        reports = self.reports()
        tail = None
        if any(report.blocked for report in reports) and self._held is not None:
            tail = self._held.placeholder(self._route.policy.placeholder_text)
        tail = self._guard.settle(reports, tail)
        return [] if tail is None else [tail]

    def reports(self) -> list[Report]:
        """The reports on prompt and texts, one for each choice; final once the stream has ended."""
        rows = [[]] if self._held is None else self._held.rows
        each_ms = 0.0 if self._held is None else self._held.spent_ms / len(rows)
        return [self._report(row, each_ms) for row in rows]

    def _report(self, row: Sequence[Verdict], ms: float) -> Report:
        before: Sequence[Verdict] = self._item.verdicts if self._item is not None else ()
        action = strongest(row)
        if not action.passes:
            action = Action.BLOCK  # what was released cannot be redacted or made again
        elif self._item is not None and self._item.refined:
            action = Action.REFINE
        elif self._item is not None:
            action = max(action, self._item.asked, key=lambda a: a.strength)
        texts = self._item.texts if self._item is not None else {}
        refined = self._item is not None and self._item.refined
        return calls.make_report(
            self._route, self._ask, texts, [*before, *row], action, refined=refined, ms=ms
        )


def _has_choices(chunk: Any) -> bool:
    return hasattr(chunk, "choices") or (hasattr(chunk, "keys") and "choices" in chunk)


def _sources(source: Any, chunks: Any) -> list[Any]:
    """What there is to close, last first: the iterator, and the object that gave it, such as a response."""
    return [chunks] if source is None or source is chunks else [chunks, source]


def _close(part: Any) -> None:
    close = getattr(part, "close", None)
    if callable(close):
        close()


async def _aclose(part: Any) -> None:
    close = getattr(part, "aclose", None) or getattr(part, "close", None)
    if not callable(close):
        return
    result = close()
    if isawaitable(result):
        await result
