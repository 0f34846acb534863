"""What a benchmark found: rows, goals and notes by section, as one JSON document and as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from safeguard.bench.timing import Spread, quantile, ratio, spread

FORMAT = "safeguard-bench/1"


@dataclass(frozen=True)
class Row:
    """One contender at one workload. seconds: per item, of each repeat, in their order.

    note: what it is, where the name does not say it. more: whatever else was measured.
    """

    contender: str
    workload: str
    seconds: Sequence[float]
    items: int = 1
    note: str = ""
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spread(self) -> Spread:
        """Of the seconds per item."""
        return spread(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        found = self.spread
        return {
            "contender": self.contender,
            "workload": self.workload,
            "note": self.note,
            "items_per_run": self.items,
            "runs": found.runs,
            "median_ms": _ms(found.median),
            "quartiles_ms": [_ms(found.low), _ms(found.high)],
            "items_per_s": round(1 / found.median, 2) if found.median else None,
            "samples_ms": [_ms(value) for value in self.seconds],
            **self.more,
        }


@dataclass(frozen=True)
class Goal:
    """How many times better something had to be, and was. got: None where it could not be measured."""

    what: str
    wanted: float
    got: Spread | None
    most: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether the median is there; `most` says that less is better."""
        if self.got is None:
            return None
        return self.got.median <= self.wanted if self.most else self.got.median >= self.wanted

    def to_dict(self) -> dict[str, Any]:
        got = self.got
        return {
            "what": self.what,
            "wanted": self.wanted,
            "at": "most" if self.most else "least",
            "got": round(got.median, 2) if got else None,
            "quartiles": [round(got.low, 2), round(got.high, 2)] if got else None,
            "runs": got.runs if got else 0,
            "reached": self.reached,
        }


@dataclass
class Section:
    """Rows that were measured together. about: the contenders' versions. failed: why some have no rows."""

    name: str
    title: str
    rows: list[Row] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def row(self, contender: str, workload: str) -> Row | None:
        """The row of that contender, None where it failed."""
        return next((r for r in self.rows if (r.contender, r.workload) == (contender, workload)), None)

    def goal(self, what: str, wanted: float, slow: Sequence[str], fast: str, workload: str) -> None:
        """Add a goal: how many times faster `fast` is than the fastest of `slow` that ran."""
        ours = self.row(fast, workload)
        rows = [row for name in slow if (row := self.row(name, workload)) is not None]
        got = None
        if ours is not None and rows:
            best = min(rows, key=lambda row: row.spread.median)
            if len(best.seconds) == len(ours.seconds):
                got = ratio(best.seconds, ours.seconds)
                what = f"{what} ({best.contender})" if len(slow) > 1 else what
        self.goals.append(Goal(what, wanted, got))

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "notes": self.notes,
            "contenders": self.about,
            "failed": self.failed,
            "rows": [row.to_dict() for row in self.rows],
            "goals": [goal.to_dict() for goal in self.goals],
        }


def document(sections: Sequence[Section], machine: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """All of it, for a JSON file. Holds no texts, no paths and no host name."""
    return {
        "format": FORMAT,
        "machine": dict(machine),
        **facts,
        "sections": [section.to_dict() for section in sections],
    }


def latencies(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Median and 99th percentile in ms of the latencies of all calls of all repeats."""
    every = [value for sample in samples for value in sample["latencies"]]
    return {"p50_ms": _ms(quantile(every, 0.5)), "p99_ms": _ms(quantile(every, 0.99)), "calls": len(every)}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """A document as text: the machine, then a table and the goals of each section."""
    machine = found["machine"]
    yield (
        f"{machine['processor']}, {machine['cores']} cores, {' '.join(machine['flags'])}; "
        f"{machine['system']}, Python {machine['python']}; load before {machine['load_before']}"
    )
    for section in found["sections"]:
        yield ""
        yield section["title"]
        yield from _table(section["rows"])
        yield from (f"  not run: {name}: {reason}" for name, reason in section["failed"].items())
        yield from (f"  note: {note}" for note in section["notes"])
        yield from (f"  {_goal_line(goal)}" for goal in section["goals"])


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    cells = [("contender", "workload", "ms/item", "quartiles", "items/s", "runs", "")]
    for row in rows:
        low, high = row["quartiles_ms"]
        extra = [
            f"{key.removesuffix('_ms')} {row[key]:g} ms" for key in ("p50_ms", "p99_ms") if key in row
        ] + [f"peak {row['peak_mb']:.0f} MB" for _ in (1,) if row.get("peak_mb")]
        cells.append(
            (
                *(row["contender"], row["workload"], f"{row['median_ms']:g}", f"{low:g} - {high:g}"),
                *(f"{row['items_per_s']:g}", str(row["runs"]), ", ".join(extra)),
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _goal_line(goal: Mapping[str, Any]) -> str:
    wanted = f"at {goal['at']} {goal['wanted']:g}"
    if goal["got"] is None:
        return f"goal not measured: {goal['what']}, {wanted}"
    low, high = goal["quartiles"]
    said = "reached" if goal["reached"] else "NOT reached"
    return f"goal {said}: {goal['what']}: {goal['got']:g} ({low:g} - {high:g}), wanted {wanted}"


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 4)
