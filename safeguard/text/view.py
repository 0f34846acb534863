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


def apply(view: View, edits: Iterable[Edit]) -> View:
    """The view after all edits, which must be in order and not overlap; the same object where there are none.

    A replacement as long as what it replaces maps character by character, any other one as a whole.
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
        if len(text) == end - start:
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
