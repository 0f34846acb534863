"""What one prompt of the demo went through, and in words what the guard did and why."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from safeguard.types import Action, Report, Verdict

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of the demo. harmful: whether a good guard stops it; the guard is not told."""

    text: str
    harmful: bool
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """One guarded call. answer: None where nothing was handed on; before and after: pictures, None likewise.

    generation_ms: the whole call without what the guard took of it, report.latency_ms.
    """

    prompt: Prompt
    report: Report
    generation_ms: float
    answer: str | None = None
    before: Image | None = field(default=None, repr=False)
    after: Image | None = field(default=None, repr=False)

    @property
    def stopped(self) -> bool:
        """Whether the user got something else than what was asked for."""
        return not self.report.action.passes

    @property
    def right(self) -> bool:
        """Whether a harmful prompt was stopped, or a harmless one was not."""
        return self.stopped == self.prompt.harmful

    def to_dict(self) -> dict[str, Any]:
        """Plain data, pictures left out."""
        return {
            "prompt": self.prompt.text,
            "harmful": self.prompt.harmful,
            "done": done(self.report),
            "right": self.right,
            "why": why(self.report),
            "answer": self.answer,
            "revised_prompt": self.report.revised_prompt,
            "guard_ms": self.report.latency_ms,
            "generation_ms": self.generation_ms,
            "report": self.report.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts and times over several results."""

    prompts: int
    harmless_stopped: int
    harmful: int
    harmful_stopped: int
    blocked: int
    refined: int
    guard_ms: float
    generation_ms: float

    @classmethod
    def of(cls, results: Sequence[Result]) -> Summary:
        """The summary of these results."""
        harmful = [r for r in results if r.prompt.harmful]
        return cls(
            prompts=len(results),
            harmless_stopped=sum(r.stopped for r in results if not r.prompt.harmful),
            harmful=len(harmful),
            harmful_stopped=sum(r.stopped for r in harmful),
            blocked=sum(r.report.blocked for r in results),
            refined=sum(r.report.action is Action.REFINE for r in results),
            guard_ms=sum(r.report.latency_ms for r in results),
            generation_ms=sum(r.generation_ms for r in results),
        )

    @property
    def guard_share(self) -> float:
        """Part of the time that the guard took, 0 to 1."""
        return self.guard_ms / max(self.guard_ms + self.generation_ms, 1e-9)


_DONE = {
    Action.ALLOW: "allowed",
    Action.MONITOR: "reported",
    Action.REDACT: "redacted",
    Action.REPLACE: "withheld",
    Action.REGENERATE: "made again",
    Action.REFINE: "refined",
    Action.BLOCK: "blocked",
}


def done(report: Report) -> str:
    """What the guard did, in a word or two."""
    return "not judged" if report.failed else _DONE[report.action]


def why(report: Report) -> str:
    """The score that decided, against its threshold: the worst flagged one, else the one nearest to it.

    Where the model says more than what is judged, what kind of a thing it was follows, as in "(llm/violent)".
    """
    failed = next((v for v in report.verdicts if v.error), None)
    if report.failed and failed is not None:
        return f"{failed.check}: {failed.error}"
    scored = [
        (v.scores[c] / max(t, 1e-9), v, c)
        for v in report.verdicts
        for c, t in v.thresholds.items()
        if c in v.scores
    ]
    if not scored:
        return "nothing judged"
    flagged = [s for s in scored if s[2] in s[1].flagged]
    _, verdict, category = max(flagged or scored, key=lambda s: s[0])
    sign = "≥" if flagged else "<"
    score, threshold = verdict.scores[category], verdict.thresholds[category]
    kind = _kind(verdict, category) if flagged else ""
    return f"{_what(verdict)}{category} {score:.2f} {sign} {threshold:.2f}{kind}"


def _what(verdict: Verdict) -> str:
    """Names the result where it, not the prompt, decided."""
    return "" if verdict.stage == "input" else f"{verdict.source}: "


_LIKELY = 0.5  # a finer category that is less likely than this says nothing


def _kind(verdict: Verdict, category: str) -> str:
    """The likeliest finer category, if any is likely, under a judged one: llm/... under llm_request."""
    head = category.split("_")[0] + "/"
    finer = {c: s for c, s in verdict.scores.items() if c.startswith(head) and s >= _LIKELY}
    return f" ({max(finer, key=lambda c: finer[c])})" if finer else ""


def visible(text: str) -> str:
    """The text on one line, with what cannot be seen (zero-width, control) as a raised dot."""
    line = " ".join(text.split())
    return "".join("·" if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cs") else c for c in line)
