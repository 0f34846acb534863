"""Results of the demo, made by hand."""

from __future__ import annotations

from typing import Any

from safeguard.demo.results import Prompt, Result
from safeguard.types import Action, Report, Verdict


def verdict(stage: Any = "input", action: Action = Action.BLOCK, score: float = 0.9, **more: Any) -> Verdict:
    flagged = () if action.passes else ("bad",)
    return Verdict("words", stage, action, {"bad": score}, {"bad": 0.5}, flagged, **more)


def result(
    action: Action = Action.ALLOW,
    *,
    harmful: bool = False,
    text: str = "a cat",
    revised: str | None = None,
    guard_ms: float = 10.0,
    **more: Any,
) -> Result:
    score = 0.1 if action.passes else 0.9
    report = Report(action, (verdict("input", action, score),), revised, latency_ms=guard_ms)
    return Result(Prompt(text, harmful), report, 30.0, **more)
