"""Several texts of one stream of chunk objects, held back together.

A chunk goes on as it came, never cut and never out of order, once all texts in it may be released. A flagged
text stops the whole stream, since all choices come from one generation.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from safeguard import calls
from safeguard.chunks import JsonText, Key, Texts, Unreadable, get, parts_of, read_chunk
from safeguard.driving import Step
from safeguard.held_text import HeldText
from safeguard.judging import Budget
from safeguard.types import Verdict

log = logging.getLogger(__name__)


_NAMES = ("id", "object", "created", "model", "system_fingerprint")
"""Parts of a chunk that the placeholder keeps, as the last chunk had them."""


class _Part:
    """One text of a stream: held back on its own."""

    def __init__(self, route: calls.Route, budget: Budget, key: Key) -> None:
        source = "output" if key[1] == "content" else f"output.{key[1]}"
        self.held = HeldText(route, budget, source)
        self.json = JsonText() if key[1].endswith("arguments") else None
        self.given = self.released = 0
        self.ended = False


class HeldChunks:
    """A stream of chunk objects: those whose texts may all be released go on, in order.

    read: how a chunk's texts are found; `read_chunk`, or a reader of the user's.
    """

    def __init__(self, route: calls.Route, read: Callable[[Any], Texts] = read_chunk) -> None:
        self._route, self._read = route, read
        self._budget = Budget(route.policy)
        self._parts: dict[Key, _Part] = {}
        self._beside: dict[Key, str] = {}
        self._queue: deque[tuple[Any, Texts, list[tuple[_Part, int]]]] = deque()
        self._count = 0
        self._last: Any = None

    @property
    def stopped(self) -> bool:
        """Whether something was flagged or failed in any of the texts."""
        return any(part.held.stopped for part in self._parts.values())

    @property
    def spent_ms(self) -> float:
        """Milliseconds of judging so far."""
        return self._budget.spent_ms

    @property
    def rows(self) -> list[list[Verdict]]:
        """The verdicts on each choice, by its number; one empty list where there was no text."""
        choices = sorted({index for index, _ in self._parts})
        rows = [[v for (i, _), part in self._parts.items() if i == index for v in part.held.verdicts]
                for index in choices]  # fmt: skip
        return rows or [[]]

    def feed(self, chunk: Any) -> Generator[Step, Any, list[Any]]:
        """The chunks that may be released after this one."""
        waiting: list[tuple[_Part, int]] = []
        self._count += 1
        if self._count > self._route.policy.max_chars:
            yield from self._refuse(
                f"the stream has more than max_chars {self._route.policy.max_chars} chunks"
            )
        try:
            texts = self._read(chunk)
        except Unreadable as exc:
            self._queue.append((chunk, Texts(), waiting))
            yield from self._refuse(str(exc))
            return (yield from self._cleared())
        self._queue.append((chunk, texts, waiting))
        self._last = chunk
        for key, text in texts.beside:
            if self._beside.get(key) != text and not self.stopped:
                self._beside[key] = text
                yield from self._judge_whole(key, text)
        for key, text in texts.added:
            if self.stopped:
                return []
            yield from self._add(key, text, waiting)
        for index in texts.ended:
            for key, part in self._parts.items():
                if key[0] == index and not part.ended:
                    yield from self._end(part)
        return (yield from self._cleared())

    def finish(self) -> Generator[Step, Any, list[Any]]:
        """Judge all texts as wholes; the chunks that may be released then."""
        for part in list(self._parts.values()):
            if not part.ended and not self.stopped:
                yield from self._end(part)
        return (yield from self._cleared())

    def placeholder(self, text: str) -> Any:
        """The chunk that ends a blocked stream: like the last one, with this text and `content_filter`."""
        stopped = [i for (i, _), part in self._parts.items() if part.held.stopped]
        try:
            return _closing(self._last, stopped[0] if stopped else 0, text)
        except Exception as exc:  # an object that cannot be copied or changed: the stream ends without one
            log.warning("no placeholder for this kind of chunk: error=%s", type(exc).__name__)
            return None

    def _add(self, key: Key, text: str, waiting: list[tuple[_Part, int]]) -> Generator[Step, Any, None]:
        if text == "":
            return
        if key not in self._parts:
            if (yield from self._is_full()):
                return
            self._parts[key] = _Part(self._route, self._budget, key)
        part = self._parts[key]
        if part.ended:
            yield from part.held.refuse("a stream must not go on after its finish_reason")
            return
        plain = text if part.json is None else part.json(text)
        part.given += len(plain)
        waiting.append((part, part.given))
        part.released += len((yield from part.held.feed(plain)))

    def _is_full(self) -> Generator[Step, Any, bool]:
        """Whether there is no room for one more text, which is an error."""
        most = self._route.policy.max_items
        if len(self._parts) < most:
            return False
        yield from self._refuse(f"more than max_items {most} texts in a stream")
        return True

    def _judge_whole(self, key: Key, text: str) -> Generator[Step, Any, None]:
        """Judge a text beside the stream's own at once; several of one name count as one, the last."""
        place = key[0], f"{key[1]}:"
        if place not in self._parts and (yield from self._is_full()):
            return
        part = self._parts[place] = _Part(self._route, self._budget, key)
        part.ended = True
        yield from part.held.feed(text)
        yield from part.held.finish()

    def _end(self, part: _Part) -> Generator[Step, Any, None]:
        part.ended = True
        tail = part.json.end() if part.json is not None else ""
        part.given += len(tail)
        part.released += len((yield from part.held.feed(tail)))
        part.released += len((yield from part.held.finish()))

    def _refuse(self, why: str) -> Generator[Step, Any, None]:
        """Book what cannot be read, with the first text."""
        part = self._parts.setdefault((0, "content"), _Part(self._route, self._budget, (0, "content")))
        yield from part.held.refuse(why)

    def _cleared(self) -> Generator[Step, Any, list[Any]]:
        """Chunks from the front of the queue whose texts are all released."""
        out: list[Any] = []
        while self._queue and not self.stopped:
            chunk, texts, waiting = self._queue[0]
            if any(end > part.released for part, end in waiting):
                break
            if self._read is read_chunk and not _still(chunk, texts):  # what a user's reader reads may change
                yield from self._refuse("a chunk was changed after it was given; give a new object each time")
                if self.stopped:
                    break
            self._queue.popleft()
            out.append(chunk)
        return out


def _still(chunk: Any, texts: Texts) -> bool:
    """Whether a chunk says what it said when it came, or could not be read even then."""
    try:
        return read_chunk(chunk) == texts
    except Unreadable:
        return texts == Texts()


def _closing(like: Any, index: int, text: str) -> Any:
    """A copy of a chunk with one choice that says this text and ends."""
    chunk = copy.deepcopy(like)
    choices: Sequence[Any] = get(chunk, "choices")
    if not choices:
        raise ValueError("the last chunk has no choice")
    choice = choices[0]
    _empty(chunk, ("choices", *_NAMES))
    _empty(choice, ("delta", "text"))
    _put(choice, "index", index)
    _put(choice, "finish_reason", "content_filter")
    if get(choice, "text") is not None:
        _put(choice, "text", text)
    delta = get(choice, "delta")
    if delta is not None:
        _empty(delta)
        _put(delta, "content", text)
    _put(chunk, "choices", [choice])
    return chunk


def _empty(value: Any, kept: Sequence[str] = ()) -> None:
    """Clear all parts of a chunk but those; what an object keeps to itself too."""
    own = () if isinstance(value, Mapping) else getattr(value, "__dict__", ())
    for name in {*parts_of(value), *own}.difference(kept):
        _put(value, name, None)


def _put(value: Any, name: str, new: Any) -> None:
    """Set a part of an object or a mapping that has it."""
    if isinstance(value, Mapping):
        if name in value or new is not None:
            value[name] = new  # type: ignore[index]  # a mapping that cannot be written raises, which is caught
    elif hasattr(value, name):
        setattr(value, name, new)
