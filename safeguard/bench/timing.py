"""Interleaved runs of several contenders, and what may be said of the times: medians, quartiles, ratios."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from safeguard.errors import SafeguardError

T = TypeVar("T")
Contender = Callable[[int], "Sample"]
"""Does the work of one repeat, whose number it is given."""


class ContenderFailed(SafeguardError):
    """A contender that could not be started, or raised; the others go on without it."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"contender {name!r} failed: {reason}")


@dataclass(frozen=True, slots=True)
class Sample:
    """One run: how long it took, for how many items, and what else was measured in it."""

    seconds: float
    items: int = 1
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles of a number of runs."""

    median: float
    low: float
    high: float
    runs: int


@dataclass
class Outcome:
    """Samples by contender, in the order of their repeats, and why some contenders have none."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def per_item(self, name: str) -> list[float]:
        """Seconds per item of each repeat."""
        return [sample.seconds / sample.items for sample in self.samples[name]]


def interleave(
    contenders: Mapping[str, Contender],
    repeats: int,
    *,
    warmups: int = 1,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Every contender once in each repeat, in an order drawn anew, so that what the machine does hits all.

    The first `warmups` rounds are not kept. A contender that raises ContenderFailed is out from then on.
    """
    if repeats < 1 or warmups < 0:
        raise ValueError(f"repeats must be 1 or more and warmups 0 or more, got {repeats} and {warmups}")
    order = random.Random(seed)
    outcome = Outcome({name: [] for name in contenders})
    for turn in range(-warmups, repeats):
        say(f"round {turn + 1} of {repeats}" if turn >= 0 else "warming up")
        names = list(outcome.samples)
        order.shuffle(names)
        for name in names:
            try:
                sample = contenders[name](turn)
            except ContenderFailed as exc:
                outcome.failed[name] = exc.reason
                del outcome.samples[name]
                continue
            if turn >= 0:
                outcome.samples[name].append(sample)
    return outcome


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, linear between neighbours. Raises ValueError for no values or one that is NaN."""
    if not values or any(math.isnan(value) for value in values):
        raise ValueError(f"a median needs numbers, got {list(values)[:5]}")
    return Spread(quantile(values, 0.5), quantile(values, 0.25), quantile(values, 0.75), len(values))


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies, linear between neighbours (numpy's default)."""
    if not values or not 0 <= share <= 1:
        raise ValueError(f"a quantile needs values and a share in [0, 1], got {len(values)} and {share}")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    at = math.floor(place)
    if at + 1 == len(ordered):
        return ordered[at]
    return ordered[at] + (place - at) * (ordered[at + 1] - ordered[at])


def ratio(slow: Sequence[float], fast: Sequence[float]) -> Spread:
    """How many times faster: slow / fast within each repeat, then the median and quartiles of that.

    Raises ValueError when the two have not the same number of runs.
    """
    return spread([a / b for a, b in zip(slow, fast, strict=True)])
