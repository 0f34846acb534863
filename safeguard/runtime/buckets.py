"""Which rows share a run, and its shape: exact lengths on the CPU, a few fixed shapes for GPU engines."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

LENGTHS = (16, 32, 64, 128, 256, 512)
"""Usual lengths of prompts; the last one is the window of every BERT."""
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Run:
    """Rows that go through a model together, and the shape that they are padded to."""

    indices: tuple[int, ...]
    rows: int
    length: int


@dataclass(frozen=True, slots=True)
class Buckets:
    """The shapes that a GPU engine is run in, so that its graphs are made once and used again.

    lengths, rows: ascending. A longer row than the last length keeps its own length: it is never cut.
    warmed: every shape is to be made before it is used; without it only the shortest and the longest row.
    """

    lengths: tuple[int, ...] = LENGTHS
    rows: tuple[int, ...] = ROWS
    warmed: bool = True

    def __post_init__(self) -> None:
        for what, sizes in (("lengths", self.lengths), ("rows", self.rows)):
            if not sizes or sizes[0] < 1 or any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
                raise ValueError(f"{what} of buckets must be positive and ascend, got {sizes}")

    @classmethod
    def fine(cls, step: int, longest: int, rows: int) -> Buckets:
        """Lengths in steps, any number of rows up to `rows`: little padding, and a row alone has the same."""
        return cls((*range(step, longest, step), longest), tuple(range(1, rows + 1)), warmed=False)

    def up_to(self, longest: int) -> Buckets:
        """The same with `longest` as the last length: a model has no positions for longer rows."""
        return replace(self, lengths=(*(n for n in self.lengths if n < longest), longest))

    def length(self, length: int) -> int:
        """The smallest bucket that holds a row of this length; the length itself where none does."""
        return _up(self.lengths, length)

    def fit(self, rows: int) -> int:
        """The smallest bucket that holds so many rows; the number itself where none does."""
        return _up(self.rows, rows)

    def shapes(self, longest: int, max_tokens: int) -> list[tuple[int, int]]:
        """Every (rows, length) that rows of at most `longest` tokens can meet, the smallest first."""
        top = self.length(longest)
        if not self.warmed:
            return [(self.rows[0], n) for n in dict.fromkeys([self.lengths[0], top])]
        lengths = dict.fromkeys([*(n for n in self.lengths if n < top), top])
        return [(r, n) for n in lengths for r in self.rows if r == self.rows[0] or r * n <= max_tokens]


def plan_runs(lengths: Sequence[int], max_tokens: int, buckets: Buckets | None = None) -> list[Run]:
    """Rows in as few runs as fit: of similar length, each of at most `max_tokens` with its padding.

    Without buckets a run is as long as its longest row. A row that is larger than the budget, and every row
    with a budget of 0, has a run of its own.
    """
    padded = [buckets.length(n) if buckets else n for n in lengths]
    groups: list[list[int]] = []
    for i in sorted(range(len(padded)), key=padded.__getitem__):
        # sorted, so the row at hand is the longest
        if groups and _holds(len(groups[-1]) + 1, padded[groups[-1][0]], padded[i], max_tokens, buckets):
            groups[-1].append(i)
        else:
            groups.append([i])
    return [
        Run(tuple(group), buckets.fit(len(group)) if buckets else len(group), padded[group[-1]])
        for group in groups
    ]


def _holds(rows: int, first: int, length: int, max_tokens: int, buckets: Buckets | None) -> bool:
    if buckets is None:
        return rows * length <= max_tokens
    return first == length and rows <= buckets.rows[-1] and buckets.fit(rows) * length <= max_tokens


def _up(sizes: Sequence[int], wanted: int) -> int:
    at = bisect_left(sizes, wanted)
    return sizes[at] if at < len(sizes) else wanted
