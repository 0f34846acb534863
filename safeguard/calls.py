"""One guarded call as data: what it asks for, how its adapter carries it out, what became of it.

`safeguard.flow` moves it along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from safeguard.driving import Lane
from safeguard.judging import Piece, Surface, hash_of, plain_text
from safeguard.policy import Policy
from safeguard.types import Action, Modality, Refiner, Report, Span, Task, Verdict

NEGATIVE = "negative_prompt"
"""Such texts name what to keep out. Softening their words would turn their meaning round: never refined."""

Texts = Mapping[str, str]
"""Argument name to text; the first is the prompt proper, the one that is refined after a generation."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What one item of a call asks for.

    Its texts by argument name, and the names of inputs that nobody can read.
    """

    texts: Texts = field(repr=False)
    unseen: tuple[str, ...] = ()
    outputs: int = 1


class Job(Protocol):
    """One guarded call as its adapter sees it.

    `first` makes the outputs of every ask, in order (a list per ask, `outputs` long); asks whose text is None
    were refused and get nothing made. `again` makes one more output for one place. Both may be coroutine
    functions when `on_loop` is true. `pieces` gives what the checks should see of each output.
    """

    @property
    def task(self) -> Task: ...
    @property
    def modality(self) -> Modality: ...
    @property
    def on_loop(self) -> bool: ...
    @property
    def asks(self) -> Sequence[Ask]: ...
    def first(self, texts: Sequence[Texts | None]) -> Any: ...
    def again(self, ask: int, place: int, texts: Texts) -> Any: ...
    def pieces(self, outputs: Sequence[Any], policy: Policy) -> Sequence[Piece]: ...
    def placeholder(self, output: Any) -> Any: ...
    def redact(self, output: Any, spans: Sequence[Span]) -> Any: ...


@dataclass(slots=True)
class Item:
    """One ask, or one output of it, on its way through the flow."""

    texts: dict[str, str] = field(repr=False)
    verdicts: list[Verdict] = field(default_factory=list)
    asked: Action = Action.ALLOW  # what became of the prompt
    made: Action = Action.ALLOW  # what the policy says of the latest output
    refined: bool = False
    rounds: int = 0
    output: Any = field(default=None, repr=False)
    views: tuple[Any, ...] = field(default=(), repr=False)  # what the checks were shown of the output


@dataclass(frozen=True, slots=True)
class Outcome:
    """Result of a flow: per ask its outputs (placeholders where withheld) and their reports."""

    outputs: list[list[Any]] = field(repr=False)
    reports: list[list[Report]]

    @property
    def flat(self) -> list[Report]:
        """All reports, ask by ask."""
        return [r for reports in self.reports for r in reports]


@dataclass(frozen=True, slots=True)
class Route:
    """The parts of a guard that one kind of call needs."""

    policy: Policy
    inputs: Surface
    outputs: Surface
    refiner: Refiner | None
    salt: bytes
    refining: Lane = field(default_factory=Lane, repr=False, compare=False)

    @property
    def always_judges(self) -> bool:
        """Whether the refiner is asked about every picture, and not about flagged ones alone."""
        looks = self.outputs.modality == "image" and self.policy.mode != "monitor"
        return looks and bool(getattr(self.refiner, "always_judge", False))


def make_report(
    route: Route,
    ask: Ask,
    texts: Texts,
    verdicts: Sequence[Verdict],
    action: Action,
    *,
    refined: bool = False,
    rounds: int = 0,
    ms: float = 0.0,
) -> Report:
    """The report on one item; texts are what its prompt became."""
    original = plain_text(next(iter(ask.texts.values()), None))
    name, revised = next(iter(texts.items()), ("", None))
    report = Report(
        action,
        tuple(verdicts),
        revised if isinstance(revised, str) and revised != original else None,
        route.refiner.name if refined and route.refiner is not None else None,
        rounds,
        ms,
        route.policy.name,
        route.policy.digest,
        hash_of(original, route.salt),
    )
    if any(not v.action.passes for v in report.final if (v.stage, v.source) == ("input", name)):
        return replace(report, revised_prompt=None)  # a rewrite that was refused is nothing to tell
    return report


def cut_spans(text: str, spans: Sequence[Span], placeholder: str) -> str:
    """The text with each flagged place replaced; overlapping places are one place."""
    out: list[str] = []
    end = 0
    for span in sorted(spans, key=lambda s: (s.start, s.end)):
        if span.start >= end:
            out += [text[end : span.start], placeholder]
        end = max(end, span.end)
    return "".join([*out, text[end:]])
