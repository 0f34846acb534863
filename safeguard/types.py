"""The nouns of the package: plain, frozen, free of any ML import."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal, Protocol, TypeVar

Modality = Literal["text", "image"]
Stage = Literal["input", "output"]
Task = Literal["t2i", "llm"]
Scores = Mapping[str, float]
"""Category name to probability in [0, 1]; higher is riskier, for every check."""

REFINER = "(refiner)"
"""Source of the verdicts that note a failure of the refiner; nothing was judged there.

No argument can have this name: the note would stand for the latest verdict on that argument's text.
"""

T_contra = TypeVar("T_contra", contravariant=True)


class Action(Enum):
    """What to do with one piece of content, mildest first; the strongest of several wins."""

    ALLOW = "allow"
    MONITOR = "monitor"
    REDACT = "redact"
    REPLACE = "replace"
    REGENERATE = "regenerate"
    REFINE = "refine"
    BLOCK = "block"

    strength: int
    """Place in the order of strength, 0 for allow."""
    passes: bool
    """Whether the content goes on unchanged."""


for _place, _action in enumerate(Action):  # plain attributes: both are read many times in every guarded call
    _action.strength, _action.passes = _place, _action.value in ("allow", "monitor")


@dataclass(frozen=True, slots=True)
class Span:
    """Characters start to end (exclusive) of the text that a check was given, and why they count."""

    start: int
    end: int
    category: str
    score: float = 1.0


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of an item was looked at.

    `checked` of `total` units ("tokens", "frames"), in `windows` pieces.
    """

    unit: str
    total: int
    checked: int
    windows: int = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check found in one item: scores, and where and how far it looked when it can tell."""

    scores: Scores
    spans: tuple[Span, ...] = ()
    coverage: Coverage | None = None


class Check(Protocol[T_contra]):
    """Scores a batch. Knows nothing of stages, thresholds or what happens next.

    Text checks get strings, image checks PIL images or arrays (see `safeguard.images`). One result per item,
    in order: a `Finding`, or bare scores where there is nothing more to say. Safe to call from several
    threads.

    modality is "text" or "image". Three attributes are optional: `digest` (what model this is, 64 hex
    digits), `operating_points` (point name -> category -> calibrated threshold) and `labels` (every category
    it can give).
    """

    @property
    def name(self) -> str: ...
    @property
    def modality(self) -> str: ...
    def __call__(self, batch: Sequence[T_contra], /) -> Sequence[Finding | Scores]: ...


@dataclass(frozen=True, slots=True)
class RefineRequest:
    """One prompt to rewrite: always the user's original, with what is known of why.

    flagged: categories over their thresholds; none where a refiner that always judges is asked of a result
    that passed. spans: where, in characters of `prompt`. result: the latest generated item (image or text),
    None before anything was generated. views: the pictures that the checks were shown of it; none for text,
    and where it could not be looked at. current: the prompt that made it. round: 0 before generation, then 1,
    2, ... tried: rewrites of it that were flagged too, in order, for a refiner with `attempts`.
    """

    prompt: str = field(repr=False)
    flagged: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    result: Any = field(default=None, repr=False)
    round: int = 0
    current: str | None = field(default=None, repr=False)
    views: tuple[Any, ...] = field(default=(), repr=False)
    tried: tuple[str, ...] = field(default=(), repr=False)


class Refiner(Protocol):
    """Rewrites prompts; returns one prompt per request, the same text to keep it, no text when it failed.

    A refiner whose optional attribute `always_judge` is true is asked about every picture, also one that all
    checks pass: the same text lets it go, a rewrite is drawn in its place, and where it fails the picture is
    what could not be judged. What is drawn last, after `max_rounds`, the checks alone judge; where there are
    none the refiner must keep it. A picture of no prompt is not asked about. Without it a refiner is asked
    about flagged pictures alone. With `attempts` over 1 it is asked so often for a prompt whose rewrites stay
    flagged, with what was `tried`.
    """

    @property
    def name(self) -> str: ...
    def __call__(self, requests: Sequence[RefineRequest], /) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one check said of one piece of content, and what the policy made of it.

    source names the piece: "prompt", "negative_prompt", "output" ... thresholds holds the judged categories
    only. error is set, and scores may be empty, where the check failed. spans are characters of the original
    text.
    """

    check: str
    stage: Stage
    action: Action
    scores: Scores
    thresholds: Scores = field(default_factory=dict)
    flagged: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    coverage: Coverage | None = None
    latency_ms: float = 0.0
    model: str | None = None
    error: str | None = None
    source: str = ""
    round: int = 0

    @property
    def margins(self) -> Scores:
        """Score minus threshold for each judged category; zero or more means flagged."""
        return {c: self.scores[c] - t for c, t in self.thresholds.items() if c in self.scores}

    @property
    def risk(self) -> float:
        """Largest score among the judged categories, 0 where none is judged; 1 for a check that failed."""
        if self.error is not None:
            return 1.0
        return max((self.scores[c] for c in self.thresholds if c in self.scores), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {
            "check": self.check,
            "stage": self.stage,
            "source": self.source,
            "round": self.round,
            "action": self.action.value,
            "scores": dict(self.scores),
            "thresholds": dict(self.thresholds),
            "margins": dict(self.margins),
            "flagged": list(self.flagged),
            "spans": [
                {"start": s.start, "end": s.end, "category": s.category, "score": s.score} for s in self.spans
            ],
            "coverage": None
            if self.coverage is None
            else {
                "unit": self.coverage.unit,
                "total": self.coverage.total,
                "checked": self.coverage.checked,
                "windows": self.coverage.windows,
            },
            "latency_ms": self.latency_ms,
            "model": self.model,
            "error": self.error,
        }


def _stop(verdict: Verdict) -> str:
    """Where a probe stopped what was being made."""
    coverage = verdict.coverage
    if coverage is None or coverage.unit != "steps":
        return ""
    return f" (stopped at step {coverage.checked} of {coverage.total})"


@dataclass(frozen=True, slots=True)
class Report:
    """Everything said of one item of a call, over all rounds. Holds no content but the revised prompt.

    action: what finally happened to the item. rounds: generations beyond the first. latency_ms: the guard's
    own time, checks and refiner, without the generation. content: salted hash of the original text, None for
    images. decoding: the guard inside the decoding that the call went through, if any.
    """

    action: Action
    verdicts: tuple[Verdict, ...] = ()
    revised_prompt: str | None = field(default=None, repr=False)
    refiner: str | None = None
    rounds: int = 0
    latency_ms: float = 0.0
    policy: str = ""
    policy_digest: str = ""
    content: str | None = None
    decoding: str | None = None

    @property
    def blocked(self) -> bool:
        """Whether the item was withheld: blocked, or replaced by a placeholder."""
        return self.action in (Action.BLOCK, Action.REPLACE)

    @property
    def failed(self) -> bool:
        """Whether it was withheld because it could not be judged, not because it was judged unsafe."""
        stopped = [v for v in self.final if not v.action.passes]
        return self.blocked and any(v.error for v in stopped) and not any(v.flagged for v in stopped)

    @property
    def final(self) -> tuple[Verdict, ...]:
        """The verdicts on what was last seen of each source; earlier rounds are history."""
        last = {(v.stage, v.source): v.round for v in self.verdicts}  # later verdicts overwrite earlier ones
        return tuple(v for v in self.verdicts if v.round == last[v.stage, v.source])

    @property
    def flagged(self) -> tuple[str, ...]:
        """Categories over their thresholds in the final verdicts, each once, in order."""
        return tuple(dict.fromkeys(c for v in self.final for c in v.flagged))

    @property
    def risk(self) -> float:
        """Largest calibrated probability among the judged categories of what was first asked, or last made.

        0 to 1, also where nothing is flagged. A refined prompt keeps the risk of the original: that is what
        was asked for.
        """
        return max((v.risk for v in self.verdicts if v.round == 0), default=0.0)

    @property
    def spans(self) -> tuple[Span, ...]:
        """Flagged places of the final verdicts."""
        return tuple(s for v in self.final for s in v.spans)

    def summary(self) -> str:
        """One line: what happened and which check said what, without any content."""
        hits = [
            f"{v.check}: " + (v.error or ", ".join(f"{c} {v.scores[c]:.2f}" for c in v.flagged)) + _stop(v)
            for v in self.verdicts
            if v.flagged or v.error
        ]
        verb = "could not be judged" if self.failed else "blocked" if self.blocked else self.action.value
        if not hits:
            return "nothing flagged"
        return f"{verb} by " + "; ".join(dict.fromkeys(hits))

    def with_action(self, action: Action) -> Report:
        """The same report with another final action."""
        return replace(self, action=action)

    def to_dict(self) -> dict[str, Any]:
        """Plain data in the form of the published schema (`safeguard policy schema --report`)."""
        return {
            "action": self.action.value,
            "risk": self.risk,
            "flagged": list(self.flagged),
            "blocked": self.blocked,
            "failed": self.failed,
            "revised_prompt": self.revised_prompt,
            "refiner": self.refiner,
            "rounds": self.rounds,
            "latency_ms": self.latency_ms,
            "policy": {"name": self.policy, "digest": self.policy_digest},
            "content": self.content,
            "decoding": self.decoding,
            "verdicts": [v.to_dict() for v in self.verdicts],
        }

    def to_json(self) -> str:
        """`to_dict` as one line of strict JSON (no NaN)."""
        return json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False)
