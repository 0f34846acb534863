"""A reading of a text that knows where in the original each of its characters came from."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Edit = tuple[int, int, str]
"""Characters start to end (exclusive) of a reading, and what stands there instead; may be empty."""


@dataclass(frozen=True, slots=True)
class View:
    """One reading of a text, with the way back to the original.

    starts, ends: for each character of `text`, where its source begins and ends (exclusive) in the original;
    neither ever goes down.
    """

    name: str
    text: str = field(repr=False)
    starts: Sequence[int] = field(repr=False)
    ends: Sequence[int] = field(repr=False)

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Offsets in the original of characters start to end (exclusive) of this reading.

        An empty span gives an empty one. Raises ValueError outside 0 <= start <= end <= len(text).
        """
        if not 0 <= start <= end <= len(self.text):
            raise ValueError(
                f"span must lie in 0 to {len(self.text)} and not be reversed, got {start} to {end}"
            )
        if start < end:
            return self.starts[start], self.ends[end - 1]
        place = self.starts[start] if start < len(self.text) else self.ends[-1] if self.text else 0
        return place, place


def raw_view(text: str, name: str = "raw") -> View:
    """The text as it stands."""
    return View(name, text, range(len(text)), range(1, len(text) + 1))


def apply(view: View, edits: Iterable[Edit], *, whole: bool = False) -> View:
    """The view after all edits, which must be in order and not overlap; the same object where there are none.

    A replacement as long as what it replaces maps character by character, any other one as a whole; with
    `whole` every one does.
    """
    pieces: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    last = 0
    for start, end, text in edits:
        if start > last:
            pieces.append(view.text[last:start])
            starts += view.starts[last:start]
            ends += view.ends[last:start]
        pieces.append(text)
        if len(text) == end - start and not whole:
            starts += view.starts[start:end]
            ends += view.ends[start:end]
        elif text:
            starts += [view.starts[start]] * len(text)
            ends += [view.ends[end - 1]] * len(text)
        last = end
    if not last:
        return view
    pieces.append(view.text[last:])
    starts += view.starts[last:]
    ends += view.ends[last:]
    return View(view.name, "".join(pieces), starts, ends)


def only_hidden(view: View, least: int) -> View | None:
    """The parts of a reading that stand in the original in another form, of `least` characters or more.

    Each on a line of its own; None where there are none, or nothing else. A part is what came as a whole from
    at least about as many characters: a code, an invisible message, but not the name of an emoji.
    """
    parts: list[tuple[int, int]] = []
    size = len(view.text)
    start = 0
    while start < size:
        source = view.starts[start], view.ends[start]
        end = start + 1
        while end < size and (view.starts[end], view.ends[end]) == source:
            end += 1
        if source[1] - source[0] > 1 and end - start <= source[1] - source[0] + 2:
            if parts and parts[-1][1] == start:
                parts[-1] = parts[-1][0], end
            else:
                parts.append((start, end))
        start = end
    parts = [(first, last) for first, last in parts if last - first >= least]
    if not parts or parts == [(0, size)]:
        return None
    texts: list[str] = []
    starts: list[int] = []
    ends: list[int] = []
    for first, last in parts:
        texts += [view.text[first:last], "\n"]
        starts += [*view.starts[first:last], view.starts[last - 1]]
        ends += [*view.ends[first:last], view.ends[last - 1]]
    return View("hidden", "".join(texts)[:-1], starts[:-1], ends[:-1])
