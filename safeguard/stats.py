"""What became of the items of a guard, counted: passed, changed, withheld by judgement or by failure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from safeguard.locks import ForkLock
from safeguard.types import REFINER, Report


@dataclass(frozen=True, slots=True)
class Stats:
    """Items that a guard has reported on since it was made; the first four add up to all of them.

    passed: went on unchanged. changed: went on redacted, refined or made again. blocked: withheld because
    they were judged unsafe. failed: withheld because they could not be judged, which is no block.
    let_through: of those that went on, the ones that some check could not judge (`on_error: allow`, or mode
    monitor).
    errors: check, or refiner, -> what went wrong, with N for its numbers -> in how many items.
    """

    passed: int = 0
    changed: int = 0
    blocked: int = 0
    failed: int = 0
    let_through: int = 0
    errors: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All items."""
        return self.passed + self.changed + self.blocked + self.failed


_NUMBER = re.compile(r"(?<!\w)-?\d[\d.,e+-]*")
"""Lengths and scores in errors, left out of the counts: or each new one would be kept for ever."""


class Tally:
    """Counts reports, from several threads, and in a process forked at any moment too."""

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()
        self._errors: dict[str, Counter[str]] = {}
        self._lock = ForkLock()

    def add(self, reports: Sequence[Report]) -> None:
        """Count what became of these items."""
        kinds = Counter(map(_kind, reports))
        errors: Counter[tuple[str, str]] = Counter()
        for report in reports:
            failed = [v for v in report.verdicts if v.error is not None]
            errors.update({(v.check, _NUMBER.sub("N", v.error or "")) for v in failed})
            unjudged = any(v.error and v.source != REFINER for v in report.final)
            kinds["let_through"] += unjudged and not report.blocked
        with self._lock:
            self._kinds += kinds
            for (check, why), count in errors.items():
                self._errors.setdefault(check, Counter())[why] += count

    def stats(self) -> Stats:
        """The counts as they are now."""
        with self._lock:
            return Stats(**self._kinds, errors={check: dict(whys) for check, whys in self._errors.items()})


def _kind(report: Report) -> str:
    if report.failed:
        return "failed"
    if report.blocked:
        return "blocked"
    return "passed" if report.action.passes else "changed"
